"""The run folder: its name, the refusal to write over another run, and one writer at a time."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import creating
from timm_xformers.recipe import Recipe, load_recipe

__all__ = ["RunFolder", "create_run_folder", "hold", "open_run_folder", "plain_name"]


class RunFolder:
    """Paths of what a run leaves behind.

    Attributes:
        root: The folder.
        recipe: Resolved recipe.
        history: One row per epoch.
        record: Final figures.
        curves: Loss and accuracy, drawn.
        confusion: Which class was taken for which, drawn.
        per_class: Recall and precision of every class.
        log: Everything that was said.
        best: Weights to use.
        last: Weights and state to go on from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.history = root / "results.csv"
        self.record = root / "results.json"
        self.curves = root / "curves.png"
        self.confusion = root / "confusion.png"
        self.per_class = root / "per_class.csv"
        self.log = root / "log.txt"
        self.best = root / "best"
        self.last = root / "last"


def create_run_folder(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Create the folder on the main process and tell the others its name.

    Raises:
        UserError: It holds something already, or cannot be written.
    """
    # A failure travels to the other processes too, which would wait for the name forever.
    answer: list[str | UserError] = [""]
    if accelerator.is_main_process:
        try:
            answer = [str(_create(recipe))]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return RunFolder(Path(answer[0]))


@contextlib.contextmanager
def hold(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Keep other processes out of a run folder; the lock ends with this process, however it ends.

    Raises:
        UserError: Another run is writing there.
    """
    from filelock import FileLock, Timeout

    path = folder.root / ".lock"
    lock = FileLock(path)
    answer: list[str] = [""]
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            answer = [f"Another process is training in {folder.root}; wait for it, or end it."]
        except (NotImplementedError, OSError):  # a file system without locks
            pass
    broadcast_object_list(answer)
    if answer[0]:
        raise UserError(answer[0])
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()
        lock.release()


def open_run_folder(root: Path) -> tuple[RunFolder, Recipe]:
    """A folder to go on in, and the recipe it was started with.

    Raises:
        UserError: It holds no run, or a finished one.
    """
    folder = RunFolder(root)
    if not folder.recipe.is_file():
        raise UserError(f"{root} holds no run (recipe.yaml is missing); correct --resume.")
    if folder.record.exists():
        raise UserError(
            f"{root} is finished; its figures are in {folder.record}. To train on from its "
            f"weights, start a new run: timm-xformers train --model {root}."
        )
    return folder, load_recipe(str(folder.recipe), {})


def _create(recipe: Recipe) -> Path:
    with creating("run folder"):
        if recipe.output is not None:
            root = Path(recipe.output)
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                unfinished = RunFolder(root).recipe.exists() and not RunFolder(root).record.exists()
                raise UsageError(
                    f"{root} is not empty; choose another --output"
                    + (f", or go on with the run in it: --resume {root}." if unfinished else ".")
                )
            root.mkdir(parents=True, exist_ok=True)
            return root
        name = plain_name(recipe.model, recipe.data)
        parent = Path("runs")
        parent.mkdir(exist_ok=True)
        taken = [re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name) for path in parent.iterdir()]
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        while True:  # another run may take a number between the look and the step
            root = parent / f"{name}-{number}"
            try:
                root.mkdir()
                return root
            except FileExistsError:
                number += 1


def plain_name(*names: str) -> str:
    """Names as part of a file name: paths and prefixes become one word each."""
    return "-".join(re.sub(r"[^\w.]+", "_", name).strip("_.")[-60:] for name in names)
