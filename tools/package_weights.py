"""A run's weights into the package: rounded, tested, described, and never changed again."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import is_model, model_entrypoint

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import sha256_of, write_text
from timm_xformers.publishing.card import LICENSE
from timm_xformers.publishing.finished_run import FinishedRun, public_settings
from timm_xformers.publishing.float16 import evaluate_float16, write_float16
from timm_xformers.records.results_json import Record
from timm_xformers.training.build import build_model
from timm_xformers.weights import (
    MANIFEST_FILE,
    MAX_BYTES,
    TAGS,
    Weights,
    check_images,
    read_manifest,
)
from tools.checkout import Checkout
from tools.generated_files import write_generated

__all__ = ["add_to_package"]

DIGITS = 5  # of the stored logits: float32 on another processor agrees to about as many


def add_to_package(
    run: FinishedRun, checkout: Checkout, data_dir: str | None = None, *, replace: bool = False
) -> tuple[Weights, Record]:
    """Put the weights of a run into a checkout's package, with all that belongs to them.

    Writes the weights, the record of their test, the run's record and recipe, the manifest, and
    what is generated from these: cards and tables.

    Args:
        run: A run of one of our models, as it is named, on a data set that gives a tag.
        checkout: Where to write.
        data_dir: Where the data lies; None takes the run's own folder.
        replace: Put it in the place of other weights of the same tag.

    Returns:
        The new entry, or the one that is there already, and the record of its test.

    Raises:
        UserError: The run cannot give this tag, or the tag is taken.
    """
    name = _tag_of(run)
    manifest = read_manifest(checkout.weights)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = write_float16(run, folder)
        digest = sha256_of(file)
        if name in manifest and manifest[name].sha256 == digest:
            write_generated(checkout)  # a run that was cut short may have left it undone
            return manifest[name], checkout.load_float16_record(manifest[name].card)
        _refuse_change(name, manifest, checkout, replace)
        if file.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{name} takes {file.stat().st_size / 2**20:.1f} MiB as float16, and the package "
                f"takes up to {MAX_BYTES >> 20} a piece; publish it on the Hub instead."
            )
        record = evaluate_float16(run, folder, name, data_dir)
        entry = _entry(name, run, record, folder, file, digest)
        shutil.copyfile(file, checkout.weights / entry.file)
    _write_records(run, record, name, checkout)
    # Last: what the manifest names is there.
    _write_manifest(checkout.weights / MANIFEST_FILE, {**manifest, name: entry})
    write_generated(checkout)
    return entry, record


def _tag_of(run: FinishedRun) -> str:
    record = run.record
    ours = is_model(record.model) and model_entrypoint(record.model).__module__.startswith(
        "timm_xformers."
    )
    if not ours:
        raise UserError(
            f"{record.model} is no model of this package, so it has no weights here; publish it on "
            "the Hub instead."
        )
    if record.data not in TAGS:
        raise UserError(
            f"{record.data} gives no tag; tags are {', '.join(TAGS)}. Publish it on the Hub "
            "instead."
        )
    if record.model_kwargs or run.recipe.classes is not None:
        settings = record.model_kwargs or f"classes {run.recipe.classes}"
        raise UserError(
            f"The run is of {record.model} with {settings}, and a tag is of the model and the data "
            "as they are named; train without, or publish it on the Hub instead."
        )
    if record.val_images is None:
        raise UserError(
            "The run held no images out, and published weights are chosen on validation; train "
            "with val_fraction above 0."
        )
    return f"{record.model.partition('.')[0]}.{record.data}"


def _refuse_change(
    name: str, manifest: dict[str, Weights], checkout: Checkout, replace: bool
) -> None:
    if name not in manifest:
        return
    if checkout.is_released():
        raise UserError(
            f"{name} has other weights, and published weights never change; give the new ones "
            "another model name, or publish them on the Hub."
        )
    others = [other for other, entry in manifest.items() if entry.card == name != other]
    if others:
        raise UserError(
            f"{' and '.join(others)} load the file of {name} too; train these first, or take their "
            "tags out of the manifest."
        )
    if not replace:
        old = manifest[name]
        raise UserError(
            f"{name} has other weights (seed {old.seed}, {old.test_top1_percent:.2f} % on the test "
            "set); add --replace to put these in their place, which works before the first "
            "release only."
        )


def _entry(
    name: str, run: FinishedRun, record: Record, folder: Path, file: Path, digest: str
) -> Weights:
    model, _ = build_model(f"local-dir:{folder}", pretrained=True)
    expects = Preprocessing.of_model(model)
    with torch.no_grad():
        logits = model.eval()(check_images(expects.shape, expects.mean, expects.std))  # (3, C)
    measured: Any = record
    return Weights(
        name=name,
        file=f"{name}.safetensors",
        bytes=file.stat().st_size,
        sha256=digest,
        license=LICENSE,
        input_size=expects.shape,
        num_classes=record.num_classes,
        mean=expects.mean,
        std=expects.std,
        crop_pct=expects.crop_pct,
        interpolation=expects.interpolation,
        label_names=tuple(run.config.get("label_names") or ()),
        test_images=measured.test_images,
        test_top1_percent=measured.test_top1_percent,
        test_top1_interval_percent=tuple(measured.test_top1_interval_percent),
        recipe_hash=measured.recipe_hash,
        seed=measured.seed,
        logits=tuple(
            tuple(float(f"{value:.{DIGITS}g}") for value in row) for row in logits.tolist()
        ),
    )


def _write_records(run: FinishedRun, record: Record, name: str, checkout: Checkout) -> None:
    tested = checkout.float16_record(name)
    tested.parent.mkdir(parents=True, exist_ok=True)
    record.save(tested)
    recipe = checkout.stored_recipe(str(run.record.recipe_hash), run.recipe)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, yaml.safe_dump(public_settings(run.recipe), sort_keys=False))
    if run.record in checkout.training_records().get(run.record.data, []):
        return
    lines = checkout.results / f"{run.record.data}.jsonl"
    before = lines.read_text(encoding="utf-8") if lines.exists() else ""
    write_text(lines, before + json.dumps(dataclasses.asdict(run.record)) + "\n")


def _write_manifest(path: Path, entries: dict[str, Weights]) -> None:
    values = {}
    for name in sorted(entries):
        values[name] = dataclasses.asdict(entries[name])
        del values[name]["name"]
    write_text(path, json.dumps(values, indent=1) + "\n")
