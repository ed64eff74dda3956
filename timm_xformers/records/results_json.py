"""The record of a run: what was measured, on what, and with which versions.

Training and evaluation write the same type, so that reports and cards read both.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

import timm_xformers
from timm_xformers.files.atomic import write_text
from timm_xformers.records.headline import Headline, headline_of

if TYPE_CHECKING:
    from timm_xformers.training.metrics import AnyMetrics

__all__ = [
    "Record",
    "environment",
    "highest",
    "origin",
    "peak_memory_mib",
    "reset_peak_memory",
    "split_fields",
    "wilson_interval",
]

VERSIONS_OF = ("timm", "torch", "torchvision", "accelerate", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One JSON object. None: does not apply, or was not measured.

    Attributes:
        kind: What made the record.
        model: Name of the model.
        model_kwargs: Its further arguments.
        params: Number of parameters.
        data: Name of the data set.
        img_size: Side of the input in pixels.
        in_chans: Colour channels.
        num_classes: Width of the classifier.
        val_images: Images that chose the best epoch.
        val_top1_percent: Accuracy on them.
        val_top1_interval_percent: Its 95 % Wilson interval.
        val_top5_percent: Accuracy with five guesses.
        val_map_percent: With several classes an image, in the place of these: mean over classes of
            the average precision.
        val_f1_micro_percent: F1 of all marks from a probability of 0.5.
        val_f1_macro_percent: Mean over classes of F1.
        val_loss: Mean cross-entropy; without labels, mean Kullback-Leibler divergence from the
            teacher.
        val_agreement_percent: Images whose best class is the teacher's.
        val_agreement_interval_percent: Without labels, its 95 % Wilson interval.
        val_teacher_top1_percent: The teacher's accuracy on them.
        test_images: Images of the test split, likewise below.
        skipped_images: Unreadable images left out of the splits in use.
        data_notes: What else was left out, or is odd about the data, without names of files.
        initial_weights: ``random weights``, or where training started from.
        teacher: Weights whose outputs training matched.
        data_digest: Of the names of classes and images, and the labels, of all splits.
        epochs: Epochs trained.
        best_epoch: Epoch whose weights were kept.
        weights_dtype: What the weights were rounded to before these figures; None: as trained.
        recipe_hash: Equal for runs that differ in seed and paths only.
        seed: Seed of the run.
        batch_size: Micro-batch, images per process.
        num_processes: Processes.
        mixed_precision: Precision of the forward pass.
        cpu_seconds: Processor time of the training process in them, summed over its threads.
        seconds: Time of the training epochs without validation, or of the evaluation.
        images_per_s: Images over that time, all processes together.
        data_wait_percent: Share of that time spent waiting for data.
        step_ms: Mean time of an update, waiting for data included; of the slowest process.
        peak_memory_mib: Peak of the GPU's memory during the run, or of the process on a CPU since
            it began; of the process that took most.
        commit: Git commit of the package if it runs from a checkout, else its version.
        versions: Python and the packages that matter.
        hardware: Processor, cores, threads, accelerator.
        created: When, in UTC.
    """

    kind: Literal["train", "evaluate"]
    model: str
    model_kwargs: dict[str, Any]
    params: int
    data: str
    img_size: int
    in_chans: int
    num_classes: int
    val_images: int | None = None
    val_top1_percent: float | None = None
    val_top1_interval_percent: list[float] | None = None
    val_top5_percent: float | None = None
    val_map_percent: float | None = None
    val_f1_micro_percent: float | None = None
    val_f1_macro_percent: float | None = None
    val_loss: float | None = None
    val_agreement_percent: float | None = None
    val_agreement_interval_percent: list[float] | None = None
    val_teacher_top1_percent: float | None = None
    test_images: int | None = None
    test_top1_percent: float | None = None
    test_top1_interval_percent: list[float] | None = None
    test_top5_percent: float | None = None
    test_map_percent: float | None = None
    test_f1_micro_percent: float | None = None
    test_f1_macro_percent: float | None = None
    test_loss: float | None = None
    test_agreement_percent: float | None = None
    test_agreement_interval_percent: list[float] | None = None
    test_teacher_top1_percent: float | None = None
    skipped_images: int | None = None
    data_notes: list[str] | None = None
    initial_weights: str | None = None
    teacher: str | None = None
    data_digest: str | None = None
    epochs: int | None = None
    best_epoch: int | None = None
    weights_dtype: str | None = None
    recipe_hash: str | None = None
    seed: int | None = None
    batch_size: int
    num_processes: int
    mixed_precision: str
    cpu_seconds: float | None = None
    seconds: float
    images_per_s: float
    data_wait_percent: float | None = None
    step_ms: float | None = None
    peak_memory_mib: float | None = None
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    created: str

    @property
    def reservations(self) -> str:
        """In one line: what was left out, or is odd about the data; empty if there is nothing."""
        notes = [*(self.data_notes or [])]
        if self.skipped_images:
            plural = "" if self.skipped_images == 1 else "s"
            notes.append(f"left out: {self.skipped_images} image{plural} that cannot be read")
        return "; ".join(notes)

    @property
    def headline(self) -> Headline:
        """Which figure counts."""
        return headline_of(self)

    def percent(self, split: str) -> float | None:
        """The headline on a split; None if it was not measured."""
        value: float | None = self.headline.of(self, split)
        return value

    def figures(self, split: str, *, beside: bool = True) -> str:
        """All figures on a split in a few words, or the headline alone; empty if there are none."""
        percent = self.percent(split)
        if percent is None:
            return ""
        ends = self.headline.interval_of(self, split)
        interval = f" (95 %: {ends[0]} to {ends[1]})" if ends else ""
        others = self.headline.beside_of(self, split) if beside else {}
        parts = [f"{word} {value:.2f} %" for word, value in others.items()]
        return ", ".join([f"{self.headline.word} {percent:.2f} %{interval}", *parts])

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def split_fields(split: str, metrics: "AnyMetrics") -> dict[str, Any]:
    """The fields of a record about one split.

    Args:
        split: ``val`` or ``test``.
        metrics: Figures over it.
    """
    fields: dict[str, Any] = {
        f"{split}_{name}_percent": round(percent, 4) for name, percent in metrics.percents.items()
    }
    if metrics.headline.counted:
        ends = wilson_interval(int(metrics.score), metrics.images)
        key = metrics.headline.key
        fields[f"{split}_{key}_interval_percent"] = [round(100 * end, 2) for end in ends]
    # Six digits are the same whatever the batch size; the rest is order of summation.
    loss = float(f"{metrics.loss:.5g}")
    return {f"{split}_images": metrics.images, f"{split}_loss": loss, **fields}


@functools.cache
def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); stays within [0, 1] and works at both ends."""
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """The fields of a record about where it was made; all processes must call this together."""
    return {
        **origin(accelerator.device),
        "peak_memory_mib": highest(accelerator, peak_memory_mib(accelerator.device)),
    }


def origin(device: torch.device) -> dict[str, Any]:
    """Commit, versions, hardware and time of a measurement."""
    hardware: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "platform": platform.platform(terse=True),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_memory_mib"] = torch.cuda.get_device_properties(device).total_memory // 2**20
    return {
        "commit": _commit(),
        "versions": _versions(),
        "hardware": hardware,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a GPU; a process's own cannot be lowered again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak of the accelerator's memory, or of the whole process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "timm-xformers": timm_xformers.__version__}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that the package runs from, or the version of an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return timm_xformers.__version__
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def highest(accelerator: Accelerator, value: float | None) -> float | None:
    """Largest value over all processes; None if it is None here, which it then is everywhere."""
    if value is None or accelerator.num_processes == 1:
        return value
    mine = torch.tensor([value], dtype=torch.float64, device=accelerator.device)
    gathered: Tensor = accelerator.gather(mine)
    return float(gathered.max())
