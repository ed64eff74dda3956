"""Folders of weights: the best, and the last with what a run needs to go on.

``best/`` and ``last/`` open with ``timm.create_model("local-dir:RUN/best", pretrained=True)``; the
checkpoint before ``last/`` stays as ``last.previous/``. Nothing here is read by unpickling objects:
weights are safetensors, the optimiser's state is loaded with weights_only.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint, save_for_hf
from torch import nn

from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import find_damage, previous_of, write_folder
from timm_xformers.records.results_csv import EpochRow, read_history, write_history
from timm_xformers.training.build import MULTI_LABEL
from timm_xformers.training.loop import EpochSums

__all__ = ["Checkpoint", "ModelInfo", "Progression", "open_last", "save_best", "save_last"]

STATE_FILE = "training_state.pt"
HISTORY_FILE = "results.csv"
PROGRESSION_FILE = "progression.json"
ORIGIN_FILE = "origin.json"
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
        sums: Of the epoch after them, for each process; empty before its first update.
        updates: Optimiser updates.
        best_epoch: Epoch whose weights are in best/; 0 before the first.
        best_score: Validation images it got right, or mAP with several classes an image.
        best_loss: Its validation loss.
        aligning: Whether the state is of the part that aligns layers with a teacher's.
    """

    num_processes: int
    epoch: int = 0
    sums: tuple[EpochSums, ...] = ()
    updates: int = 0
    best_epoch: int = 0
    best_score: float = -1
    best_loss: float = math.inf
    aligning: bool = False

    @property
    def place(self) -> str:
        """Words for where the run stands."""
        if self.sums:
            return f"in epoch {self.epoch + 1} after step {self.sums[0].passes}"
        return f"after epoch {self.epoch}"


@dataclass(frozen=True)
class ModelInfo:
    """What is kept beside weights.

    Attributes:
        model_args: Arguments that build the model again, by name.
        preprocessing: What the weights expect of an image.
        class_names: By label; empty if unknown.
        multi_label: Whether an image may have several classes.
    """

    model_args: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    multi_label: bool = False


def save_best(folder: Path, model: nn.Module, info: ModelInfo) -> None:
    """Write weights and configuration in timm's format, to the run's ``best``."""
    with write_folder(folder) as fresh:
        _export(fresh, model, info)


def save_last(
    folder: Path,
    model: nn.Module,
    info: ModelInfo,
    state: dict[str, Any],
    progression: Progression,
    rows: list[EpochRow],
    origin: dict[str, Any],
) -> None:
    """Write what `save_best` does, of the model as it is trained, and what the run needs to go on.

    The state holds tensors and plain values: optimiser, averaged weights, scaler. The origin is
    what the run was started with: its ``recipe`` and its ``data``, as JSON has them.
    """
    with write_folder(folder, keep_previous=True) as fresh:
        _export(fresh, model, info)
        torch.save(state, fresh / STATE_FILE)
        text = json.dumps(asdict(progression), indent=2)
        (fresh / PROGRESSION_FILE).write_text(text, encoding="utf-8")
        (fresh / ORIGIN_FILE).write_text(json.dumps(origin), encoding="utf-8")
        write_history(fresh / HISTORY_FILE, rows)


@dataclass(frozen=True)
class Checkpoint:
    """What `save_last` wrote, read back.

    Attributes:
        folder: Where it lies.
        progression: How far the run got.
        rows: Of the finished epochs.
        damaged: A newer folder that is not used, and why; empty if there is none.
        origin: What the run was started with; empty in checkpoints of earlier versions.
    """

    folder: Path
    progression: Progression
    rows: list[EpochRow]
    damaged: str
    origin: dict[str, Any]

    def load(self, model: nn.Module) -> dict[str, Any]:
        """Read the weights into a model and return the state."""
        load_checkpoint(model, str(self.folder / "model.safetensors"))
        state: dict[str, Any] = torch.load(
            self.folder / STATE_FILE, map_location="cpu", weights_only=True
        )
        return state


def open_last(folder: Path) -> Checkpoint:
    """Find the newest checkpoint that is whole.

    Args:
        folder: The run's ``last``.

    Raises:
        UserError: Neither it nor the one before it is whole.
    """
    complaints = []
    for candidate in (folder, previous_of(folder)):
        damage = find_damage(candidate)
        if damage is not None:
            complaints.append(f"{candidate}: {damage}")
            continue
        values = json.loads((candidate / PROGRESSION_FILE).read_text(encoding="utf-8"))
        if "best_top1" in values:  # as it was called before there were other scores
            values["best_score"] = values.pop("best_top1")
        values["sums"] = tuple(EpochSums(**sums) for sums in values["sums"])
        rows = read_history(candidate / HISTORY_FILE)
        # A folder that is not there was being replaced, and the one before it is the newest.
        damaged = complaints if folder.exists() else []
        origin = candidate / ORIGIN_FILE
        started = json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {}
        return Checkpoint(candidate, Progression(**values), rows, "; ".join(damaged), started)
    raise UserError(f"No checkpoint to go on from ({'; '.join(complaints)}); start a new run.")


def _export(folder: Path, model: nn.Module, info: ModelInfo) -> None:
    preprocessing, class_names = info.preprocessing, info.class_names
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
    described: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
    if info.multi_label:
        config["notes"] = (MULTI_LABEL,)  # timm keeps these, and nothing beside them
        described["problem_type"] = MULTI_LABEL  # for transformers
    exported.pretrained_cfg = config
    packing = exported.register_state_dict_post_hook(_pack)
    try:
        save_for_hf(
            model,
            str(folder),
            model_config=described,
            model_args=info.model_args,
            safe_serialization=True,
        )
    finally:
        packing.remove()
        exported.pretrained_cfg = before
    # It stands beside the arguments, and transformers passes both: a twofold argument.
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(written, indent=2), encoding="utf-8")


def _pack(model: nn.Module, weights: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Give weights their plain order in memory: safetensors takes no filters in channels_last."""
    for name, value in weights.items():
        weights[name] = value.contiguous()
