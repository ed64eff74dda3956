"""Weights rounded to float16, and what the rounding cost."""

import dataclasses
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import sweep, write_folder
from timm_xformers.predicting.evaluate import evaluate, said_twice
from timm_xformers.publishing.finished_run import WEIGHTS_FILE, FinishedRun
from timm_xformers.records.results_json import Record

__all__ = ["convert", "evaluate_float16", "write_float16"]


def convert(run: FinishedRun, folder: Path, data_dir: str | None = None) -> Record:
    """Write a folder with float16 weights, their configuration and the record of their test.

    Raises:
        UserError: The folder exists, or a weight is beyond float16.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists; choose another --output.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)  # of a convert that was killed
    with write_folder(folder) as fresh:
        write_float16(run, fresh)
        record = evaluate_float16(run, fresh, run.record.model, data_dir)
        record.save(fresh / "results.json")
    return record


def write_float16(run: FinishedRun, folder: Path) -> Path:
    """Write the best weights as float16, with their configuration, to an empty folder.

    Returns:
        The weights' file; ``local-dir:`` opens the folder.

    Raises:
        UserError: A weight is beyond float16.
    """
    weights = load_file(run.folder.best / WEIGHTS_FILE)
    for name, value in weights.items():
        if not value.is_floating_point():
            continue
        weights[name] = value.half()
        if not weights[name].isfinite().all():
            raise UserError(
                f"{name} has values up to {float(value.abs().max()):g}, and float16 ends at 65504; "
                "train with more weight_decay or clip_grad."
            )
    # What save_for_hf writes too; readers take the tensors for PyTorch's.
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copyfile(run.folder.best / "config.json", folder / "config.json")
    return folder / WEIGHTS_FILE


def evaluate_float16(run: FinishedRun, folder: Path, name: str, data_dir: str | None) -> Record:
    """Test the weights of `write_float16`, as they will be loaded, under the model's ``name``.

    Without ``data_dir`` the data lies where the run had it. Measured in float32, whatever the run
    trained in: that is what `evaluate` does with a model's name, and bf16 sums differ between
    processors.
    """
    recipe = dataclasses.replace(
        run.recipe,
        model=f"local-dir:{folder}",
        model_kwargs={},  # the folder says them
        pretrained=False,
        mixed_precision="no",
        data_dir=data_dir or run.recipe.data_dir,
    )
    record = evaluate(recipe)
    twice = said_twice(run.record.data_notes) if data_dir is None else []
    return dataclasses.replace(
        record,
        data_notes=[*(record.data_notes or []), *twice],
        model=name,
        model_kwargs=run.record.model_kwargs,
        epochs=run.record.epochs,
        best_epoch=run.record.best_epoch,
        weights_dtype="float16",
        recipe_hash=run.record.recipe_hash,
        seed=run.record.seed,
    )
