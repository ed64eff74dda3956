"""Folders of weights, written so that a crash leaves either the old folder or the new one.

``best/`` and ``last/`` open with ``timm.create_model("local-dir:RUN/best", pretrained=True)``;
``last/`` also holds what a run needs to go on after its last finished epoch. Nothing here is read
by unpickling objects: weights are safetensors, the optimiser's state is loaded with weights_only.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from timm_xformers.training.errors import UserError
from timm_xformers.training.preprocessing import Preprocessing

__all__ = ["Progression", "load_last", "save_best", "save_last", "write_folder"]

STATE_FILE = "training_state.pt"
PROGRESSION_FILE = "progression.json"
PUBLISHED_ONLY = (
    "tag",
    "license",
    "origin_url",
    "notes",
    "label_names",
    "label_descriptions",
    "test_input_size",
    "test_crop_pct",
)


@dataclass(frozen=True)
class Progression:
    """How far a run got.

    Attributes:
        num_processes: Processes of the run: another number would draw other batches.
        epoch: Finished epochs.
        updates: Optimiser updates.
        best_epoch: Epoch whose weights are in best/; 0 before the first.
        best_top1: Validation images it got right.
        best_loss: Its validation loss.
    """

    num_processes: int
    epoch: int = 0
    updates: int = 0
    best_epoch: int = 0
    best_top1: int = -1
    best_loss: float = math.inf


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Write a folder whole: fill the temporary one that is yielded; it then takes the name.

    Raises:
        UserError: The files cannot be written; what was there before is untouched.
    """
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    previous = path.with_name(f"{path.name}.previous")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for file in fresh.iterdir():
            _sync(file)
        _sync(fresh)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        fresh.rename(path)
        _sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as these
        raise UserError(
            f"Cannot write {path}: {' '.join(str(error).split())}; free space or rights, or choose "
            "another --output. The folders of earlier epochs are as they were."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def save_best(
    folder: Path,
    model: nn.Module,
    model_args: dict[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
) -> None:
    """Write weights and configuration in timm's format.

    Args:
        folder: The run's ``best``.
        model: With the weights to keep.
        model_args: Arguments that build it again, by name.
        preprocessing: What the weights expect.
        class_names: By label; empty if unknown.
    """
    with write_folder(folder) as fresh:
        _export(fresh, model, model_args, preprocessing, class_names)


def save_last(
    folder: Path,
    model: nn.Module,
    model_args: dict[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    state: dict[str, Any],
    progression: Progression,
) -> None:
    """Write what `save_best` writes, and what the run needs to go on.

    Args:
        folder: The run's ``last``.
        model: As it is being trained, not averaged.
        model_args: Arguments that build it again, by name.
        preprocessing: What the weights expect.
        class_names: By label; empty if unknown.
        state: Tensors and plain values: optimiser, averaged weights, scaler.
        progression: How far the run got.
    """
    with write_folder(folder) as fresh:
        _export(fresh, model, model_args, preprocessing, class_names)
        torch.save(state, fresh / STATE_FILE)
        text = json.dumps(asdict(progression), indent=2)
        (fresh / PROGRESSION_FILE).write_text(text, encoding="utf-8")


def load_last(folder: Path, model: nn.Module) -> tuple[dict[str, Any], Progression]:
    """Read weights into a model, and return the state and the progression of `save_last`.

    Raises:
        UserError: The folder is missing or damaged.
    """
    if not folder.exists():  # the run ended between the two renames of write_folder
        folder = folder.with_name(f"{folder.name}.previous")
    try:
        values = json.loads((folder / PROGRESSION_FILE).read_text(encoding="utf-8"))
        progression = Progression(**values)
        load_checkpoint(model, str(folder / "model.safetensors"))
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True
        )
    except Exception as error:
        # Whatever a damaged file makes json, safetensors or torch raise, the cause is the same.
        raise UserError(
            f"Cannot continue from {folder}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; start a new run."
        ) from error
    return state, progression


def _export(
    folder: Path,
    model: nn.Module,
    model_args: dict[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
) -> None:
    exported: Any = model  # timm's attributes are none that nn.Module declares
    before = exported.pretrained_cfg
    config: dict[str, Any] = dict(before)
    config.update(
        input_size=preprocessing.shape,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        interpolation=preprocessing.interpolation,
        # What follows describes published weights, and these are none.
        **dict.fromkeys(PUBLISHED_ONLY),
    )
    exported.pretrained_cfg = config
    try:
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": list(class_names)} if class_names else None,
            model_args=model_args,
            safe_serialization=True,
        )
    finally:
        exported.pretrained_cfg = before


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and renames without this
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
