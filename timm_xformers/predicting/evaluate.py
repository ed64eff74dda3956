"""Evaluation of any timm model on a data set, as a record."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from timm_xformers.data.data import Data, make_batches, open_data
from timm_xformers.data.duplicates import TWICE
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.text import some
from timm_xformers.predicting.classes import class_names
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.find_runs import read_record
from timm_xformers.records.results_json import Record, environment, split_fields
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.training.build import build_for, check_input, is_multi_label
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.metrics import evaluate_model, write_classes
from timm_xformers.training.teacher import open_teacher

__all__ = ["evaluate", "open_published", "said_twice"]


def evaluate(
    recipe: Recipe,
    split: Literal["val", "test"] = "test",
    checkpoint: Path | None = None,
    details: Path | None = None,
    *,
    skip_unknown: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Evaluate a model on inputs as its weights expect them, classes matched by name.

    Args:
        recipe: Names model and data. Its size of the input goes over the one that the weights name.
        split: Which images.
        checkpoint: Weights to load instead of those that belong to the model's name. A bare file
            says nothing of sizes and normalisation, so these follow from the data, as in training.
        details: Folder to write per_class.csv and, of one class an image, confusion.png to.
        skip_unknown: Leave out images of classes that the model does not know.
        say: Told what a person should know besides the record, a line at a time.

    Raises:
        UserError: Something the user can repair.
    """
    if recipe.replace and not recipe.model.startswith("local-dir:"):
        raise UsageError(
            "The recipe replaces attention (replace), which training does; name the run's folder."
        )
    model, data, preprocessing = (
        open_published(recipe, split, skip_unknown=skip_unknown)
        if checkpoint is None
        else _from_file(recipe, split, checkpoint, say)
    )
    own = _own_run(recipe)
    if own is not None and data.undivided:
        raise UserError(
            f"{recipe.data_dir} has no test part, and the model was trained on it; use --split "
            "val, or name other images by --data-dir."
        )
    # Only the split is opened here, so what another has of its pictures is the run's to know.
    twice = [] if own is None else said_twice(_read_notes(own.record))
    for note in (*data.notes, *twice):
        say(note)
    for name in data.skipped:
        say(f"left out, cannot be read: {name}")
    images = data.split(split)
    check_input(model, preprocessing.shape)
    # After the data: a stream opened with a process group would be cut by rank.
    accelerator = make_accelerator(recipe.mixed_precision)
    batches = make_batches(
        images,
        recipe,
        preprocessing,
        in_memory=data.in_memory,
        training=False,
        device=accelerator.device,
    )
    if details is not None:  # before the work, so that a missing right costs none
        if details.exists() and not details.is_dir():
            raise UsageError(f"{details} is a file; choose a folder as --details.")
        details.mkdir(parents=True, exist_ok=True)
    model.to(accelerator.device)
    teacher = open_teacher(recipe) if data.unlabelled else None
    taught = None if teacher is None else teacher.model.to(accelerator.device)
    start = time.perf_counter()
    metrics = evaluate_model(model, batches, recipe.batch_size, accelerator, taught)
    seconds = time.perf_counter() - start
    if details is not None and accelerator.is_main_process:
        title = f"{recipe.model} on {recipe.data}, {split}"
        write_classes(RunFolder(details), metrics, data.class_names, title)
    return Record(
        kind="evaluate",
        model=recipe.model,
        model_kwargs=recipe.model_kwargs,
        params=sum(parameter.numel() for parameter in model.parameters()),
        data=recipe.data,
        **preprocessing.size_fields,
        num_classes=data.num_classes,
        teacher=None if teacher is None else teacher.name,
        skipped_images=len(data.skipped),
        data_notes=data.kept_notes + twice,
        batch_size=recipe.batch_size,
        num_processes=accelerator.num_processes,
        mixed_precision=recipe.mixed_precision,
        seconds=round(seconds, 3),
        images_per_s=round(metrics.images / seconds, 1),
        **split_fields(split, metrics),
        **environment(accelerator),
    )


def open_published(
    recipe: Recipe, split: str, *, skip_unknown: bool = False
) -> tuple[nn.Module, Data, Preprocessing]:
    """A model whose configuration says what it expects; the data follows the model.

    Args:
        recipe: Names model and data.
        split: Which images will be read.
        skip_unknown: Leave out images of classes that the model does not know.

    Raises:
        UserError: Model, weights or data are missing, or do not fit each other.
    """
    arguments = dict(recipe.model_kwargs)
    if recipe.in_chans is not None:
        arguments["in_chans"] = recipe.in_chans
    model, preprocessing = build_for(recipe, pretrained=True, **arguments)
    if is_multi_label(model):
        recipe = dataclasses.replace(recipe, multi_label=True, loss="bce")
    elif recipe.multi_label:
        raise UsageError(
            f"{recipe.model} gives an image one class, and multi_label=true is for several; drop "
            "it, or train a model with it first."
        )
    num_classes: Any = model.num_classes
    fitted = dataclasses.replace(
        recipe,
        **preprocessing.size_fields,
        num_classes=recipe.num_classes or num_classes,
    )
    data = open_data(fitted, [split], class_names(model), skip_unknown=skip_unknown)
    return model, data, preprocessing


def _from_file(
    recipe: Recipe, split: str, checkpoint: Path, say: Callable[[str], None]
) -> tuple[nn.Module, Data, Preprocessing]:
    """A model built around the data, as training does it."""
    data = open_data(recipe, [split])
    names = data.class_names
    order = f" ({some(names)})" if names else ""
    say(
        f"{checkpoint} names no classes, so they are matched by position: it must have been "
        f"trained on the {data.num_classes} of the data in their order{order}"
    )
    if (checkpoint.parent / "config.json").is_file():
        say(f"the folder says more: --model local-dir:{checkpoint.parent} goes by names")
    arguments = {
        "in_chans": data.in_chans,
        "num_classes": data.num_classes,
        **recipe.model_kwargs,
    }
    model, preprocessing = build_for(recipe, data, checkpoint=checkpoint, **arguments)
    return model, data, data.preprocess(preprocessing, recipe.normalize)


def _own_run(recipe: Recipe) -> RunFolder | None:
    """The run that the weights are of, if the data is what it was trained on."""
    prefix, _, folder = recipe.model.partition(":")
    own = RunFolder(Path(folder).parent)
    if prefix != "local-dir" or not own.recipe.is_file():
        return None
    trained = load_recipe(str(own.recipe), {})
    places = [Path(each.data_dir or "").resolve() for each in (trained, recipe)]
    return own if trained.data == recipe.data and places[0] == places[1] else None


def _read_notes(path: Path) -> list[str] | None:
    """What a run's record says of its data; nothing where it is not finished."""
    if not path.is_file():
        return None
    try:
        return read_record(json.loads(path.read_text(encoding="utf-8"))).data_notes
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({detail}); restore or remove it.") from error


def said_twice(notes: Sequence[str] | None) -> list[str]:
    """Of a run's notes on its data, those on pictures that stand in two of its parts."""
    return [f"when it was trained, {note}" for note in notes or () if note.startswith(TWICE)]
