"""A finished run, opened to give its weights away: whole, or refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from timm_xformers.errors import UserError
from timm_xformers.files.atomic import find_damage
from timm_xformers.recipe import NO_INFLUENCE, Recipe, load_recipe
from timm_xformers.records.find_runs import read_record
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import RunFolder

__all__ = ["WEIGHTS_FILE", "FinishedRun", "open_finished", "public", "public_settings"]

WEIGHTS_FILE = "model.safetensors"
# Arguments of models that name files.
FILES = ("file", "checkpoint_path")
# A whole value that is a path: after local-dir: or file://, or one that begins as only paths do.
LOCAL_PATH = re.compile(
    r"^(local-dir:|file://)?(?:(?<=:)|(?<=//)|(?:[A-Za-z]:)?[/\\]|~|\.\.?[/\\]).*$"
)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run whose weights are as they were written.

    Attributes:
        folder: Where it lies.
        record: Its figures.
        recipe: Its settings.
        config: best/config.json.
    """

    folder: RunFolder
    record: Record
    recipe: Recipe
    config: dict[str, Any]


def open_finished(root: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: It is none, is not finished, was never tested or is damaged.
    """
    folder = RunFolder(root)
    if not folder.recipe.is_file():
        raise UserError(f"{root} holds no run (recipe.yaml is missing); name a run folder.")
    if not folder.record.is_file():
        raise UserError(
            f"{root} is not finished; go on with it: timm-xformers train --resume {root}."
        )
    damage = find_damage(folder.best)
    if damage is not None:
        raise UserError(f"{folder.best} is damaged ({damage}); train again, or restore the folder.")
    try:
        record = read_record(json.loads(folder.record.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{folder.record} is damaged ({' '.join(str(error).split())}); restore it."
        ) from error
    if record.percent("test") is None:
        raise UserError(f"{root} was never tested; use a data set with a test split.")
    config = json.loads((folder.best / "config.json").read_text(encoding="utf-8"))
    return FinishedRun(folder, record, load_recipe(str(folder.recipe), {}), config)


def public_settings(recipe: Recipe) -> dict[str, Any]:
    """What shapes a run's result: its settings without seed, folders and the machine's affairs."""
    values = dataclasses.asdict(recipe)
    return {name: public(value) for name, value in values.items() if name not in NO_INFLUENCE}


def public(value: Any) -> Any:
    """A value, however nested, whose paths on this machine have become the word PATH.

    Starting weights and teachers may lie in a local folder; names of data and models with a slash
    stay as they are.
    """
    if isinstance(value, dict):
        return {k: "PATH" if k in FILES and v else public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return LOCAL_PATH.sub(lambda found: f"{found[1] or ''}PATH", value)
