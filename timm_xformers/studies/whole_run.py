"""One training as part of something larger: begun, gone on with, or already finished."""

import dataclasses
import shutil
from pathlib import Path

from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.training.train import resume, train

__all__ = ["train_whole"]


def train_whole(recipe: Recipe, root: Path) -> Record:
    """Train to the end from wherever a run folder stands.

    Args:
        recipe: The settings; a folder that was begun with others is begun anew.
        root: The run folder.

    Raises:
        UserError: As `train` and `resume` do.
    """
    folder = RunFolder(root)
    if folder.record.is_file():
        return Record.load(folder.record)
    if any((root / name).exists() for name in ("last", "last.previous")):
        stored = load_recipe(str(folder.recipe), {})
        if stored.digest == recipe.digest:
            changes = {"data_dir": recipe.data_dir, "num_workers": recipe.num_workers}
            return resume(root, **changes)[1]
    shutil.rmtree(root, ignore_errors=True)  # killed before its first step
    return train(dataclasses.replace(recipe, output=str(root)))[1]
