"""The folder of a selection: what was asked for, what is done, and who is at work on the rest."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from timm_xformers.errors import UsageError
from timm_xformers.files.atomic import creating, write_text
from timm_xformers.recipe import Recipe
from timm_xformers.studies.selecting.folds import FoldResult, Folds, configuration_key, run_fold
from timm_xformers.studies.selecting.space import Space
from timm_xformers.studies.shared_folder import SharedFolder

__all__ = ["Search"]


def _file(name: str, what: str) -> Any:
    return property(lambda search: search.root / name, doc=what)


@dataclasses.dataclass(frozen=True)
class Search(SharedFolder):
    """A recipe, what varies in it, and the folder that receives everything.

    Attributes:
        recipe: What all configurations share.
        space: What they may set.
        root: The folder.
    """

    recipe: Recipe
    space: Space
    root: Path
    definition = _file("search.yaml", "What is selected from what.")
    database = _file("study.db", "Optuna's study.")
    csv = _file("selection.csv", "One row per configuration and fold.")
    markdown = _file("selection.md", "The table, best first.")
    plot = _file("selection.png", "The same, drawn.")
    best = _file("best.yaml", "The recipe that was chosen.")
    final = _file("final", "Run folder of the training on all images.")

    def create(self, folds: Folds, check: Callable[[], None]) -> None:
        """Create the folder, or enter one that was created for the same search.

        ``check`` is called before anything is written to a new folder.

        Raises:
            UserError: The folder holds something else, or cannot be written.
        """
        text = self._definition(folds)
        with creating("folder"):
            if not self.definition.is_file():
                if self.root.exists() and (
                    not self.root.is_dir()
                    or any(path.name not in ("locks", "folds") for path in self.root.iterdir())
                ):
                    raise UsageError(f"{self.root} is not empty; choose another --output.")
                check()
                (self.root / "locks").mkdir(parents=True, exist_ok=True)
                (self.root / "folds").mkdir(exist_ok=True)
                with self.claim("folder", wait=True):
                    if not self.definition.is_file():  # others may start at the same moment
                        write_text(self.definition, text)
        if self.definition.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{self.root} holds another search ({self.definition} says which); choose another "
                "--output."
            )

    def _definition(self, folds: Folds) -> str:
        """What must not change from one start to the next."""
        recipe = dataclasses.asdict(self.recipe)
        for name in ("output", "data_dir", "num_workers", "download"):
            del recipe[name]
        labels = folds.data.train.labels
        data = {
            "training_images": len(labels),
            "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16],
        }
        content = {"data": data, "space": dataclasses.asdict(self.space), "recipe": recipe}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def result_path(self, values: dict[str, Any], fold: int) -> Path:
        """File of one configuration's result on one fold."""
        return self.root / "folds" / f"{configuration_key(values)}-{fold}.json"

    def result(self, values: dict[str, Any], fold: int) -> FoldResult | None:
        """That result, if there is one."""
        path = self.result_path(values, fold)
        return FoldResult.load(path) if path.is_file() else None

    def results(self, values: dict[str, Any]) -> list[FoldResult]:
        """Results of a configuration, by fold."""
        found = [self.result(values, fold) for fold in range(1, self.space.folds + 1)]
        return [result for result in found if result is not None]

    def run(
        self,
        name: str,
        values: dict[str, Any],
        folds: Folds,
        fold: int,
        go_on: Callable[[int, float], bool] | None = None,
    ) -> FoldResult:
        """Do what the caller has claimed, as `run_fold` does, and keep the result."""
        result = run_fold(self.recipe, values, folds, fold, go_on)
        result.save(self.result_path(values, fold))
        text = f"{name} fold {fold}/{self.space.folds}: {result.state}"
        if result.val_loss:
            text += (
                f", top-1 {result.val_top1_percent[-1]:.2f} %, loss {result.val_loss[-1]:.4f} "
                f"after {result.epochs} epochs"
            )
        self.say(
            f"{text}, {result.seconds:.1f} s" + (f": {result.reason}" if result.reason else "")
        )
        return result
