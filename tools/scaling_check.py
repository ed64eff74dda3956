"""How far the arithmetic of `scaling` is off, on the machine at hand.

Small runs are measured, and each is predicted from another one: the time of a step from its
multiply-adds and the speed that a reference reached; the memory that a larger batch adds from what
autograd keeps; the time that two processes lose to the all-reduce from the bandwidth that one
tensor saw. Measurements have processes of
their own, with one thread.

    python -m tools.scaling_check
"""

import contextlib
import dataclasses
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from torch.nn.parallel import DistributedDataParallel

from timm_xformers.errors import UserError
from timm_xformers.files.tables import markdown_table
from timm_xformers.planning.dryrun import measure_steps
from timm_xformers.planning.scaling import (
    BYTES_PER_VALUE,
    Cluster,
    all_reduce_seconds,
    costs_of,
)
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import peak_memory_mib
from timm_xformers.training.build import build_model
from timm_xformers.training.session import open_session

__all__ = ["Prediction", "check", "render_check"]

BATCH_SIZE = 16
# The first predicts the others.
STEPS = (
    ("vix_softmax", 12),
    ("vix_softmax", 8),
    ("vix_softmax", 16),
    ("vix_performer_softmax_m32", 12),
    ("vix_nystrom", 12),
)
MEMORY = (("vix_softmax", 12), ("vix_performer_softmax_m32", 12))
MEMORY_BATCHES = (16, 64)
# Many parameters and little arithmetic, so that the all-reduce shows.
SHARED = ("vit_tiny_patch16_224", 32)
ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One figure, predicted and measured."""

    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def error_percent(self) -> float:
        """How much more was predicted than measured."""
        return 100 * (self.predicted / self.measured - 1)


def check() -> tuple[list[Prediction], float, float]:
    """Measure and predict; takes a minute on a quiet machine.

    Returns:
        Predictions, the reference's billions of operations a second, and the images that one core
        decodes and augments a second.
    """
    costs = {place: costs_of(*place, bf16=False) for place in {*STEPS, *MEMORY}}
    *seconds, decode_img_s = _alone(_speeds)
    work = [6e9 * costs[place].gmacs * BATCH_SIZE for place in STEPS]
    rate = work[0] / seconds[0]
    found = [
        Prediction(f"step of {name}, {side} px", "ms", 1e3 * operations / rate, 1e3 * measured)
        for (name, side), operations, measured in list(zip(STEPS, work, seconds, strict=True))[1:]
    ]
    less, more = MEMORY_BATCHES
    for name, side in MEMORY:
        added = costs[name, side].activation_mib * (more - less)
        measured = _alone(_peak_mib, name, side, more) - _alone(_peak_mib, name, side, less)
        label = f"memory of {name}, {side} px, batch {less} to {more}"
        found.append(Prediction(label, "MiB", added, measured))
    found.append(_shared_step())
    return found, rate / 1e9, decode_img_s


def render_check(found: list[Prediction], giga_operations_s: float, decode_img_s: float) -> str:
    """Predictions as a table in Markdown, and the two rates."""
    rows = [
        [
            p.what,
            f"{p.predicted:.1f} {p.unit}",
            f"{p.measured:.1f} {p.unit}",
            f"{p.error_percent:+.0f} %",
        ]
        for p in found
    ]
    lines = markdown_table(["what", "predicted", "measured", "error"], rows, "lr")
    name, side = STEPS[0]
    lines += [
        "",
        f"Reference: {name} at {side} pixels reaches {giga_operations_s:.1f} billion operations a "
        f"second on one core, which decodes and augments "
        f"{decode_img_s:.0f} JPEGs of 500 x 375 pixels a second.",
    ]
    return "\n".join(lines)


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process: peaks of memory cannot be lowered again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _speeds() -> list[float]:
    """Seconds of a step of each of `STEPS`, and images a second that a core decodes."""
    torch.set_num_threads(1)
    seconds = []
    for name, side in STEPS:
        recipe = Recipe(model=name, img_size=side, batch_size=BATCH_SIZE, val_fraction=0)
        session = open_session(recipe)
        seconds.append(min(measure_steps(session, session.stage)[0][0] for _ in range(2)))
    return [*seconds, _decode_img_s()]


def _peak_mib(name: str, side: int, batch_size: int) -> float:
    model: Any = build_model(name, img_size=side)[0].train()
    images = torch.randn(batch_size, model.pretrained_cfg["input_size"][0], side, side)
    for _ in range(2):
        model(images).sum().backward()
    peak = peak_memory_mib(images.device)
    if peak is None:
        raise UserError("Peak memory cannot be read on this system; check on Linux or macOS.")
    return peak


def _decode_img_s() -> float:
    """Smooth noise is to a decoder about what a photograph is."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    transform: Any = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1")
    start, count = time.perf_counter(), 100
    for _ in range(count):
        with Image.open(buffer) as image:
            transform(image.convert("RGB"))
    return count / (time.perf_counter() - start)


def _shared_step() -> Prediction:
    """Two processes with and without their all-reduce, against the time of one tensor's."""
    name, side = SHARED
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(2, maxtasksperchild=1) as pool:
            places = [(rank, str(Path(folder) / "meet")) for rank in range(2)]
            results = pool.starmap(_rank_seconds, places, chunksize=1)
    params, gb_s, apart, together = (max(values) for values in zip(*results, strict=True))
    cluster = Cluster(node_gb_s=gb_s, network_gb_s=gb_s, latency_us=0)
    predicted = all_reduce_seconds(BYTES_PER_VALUE * params, 2, cluster)
    label = f"all-reduce of {name}, {side} px, two processes"
    return Prediction(label, "ms", 1e3 * predicted, 1e3 * (together - apart))


def _rank_seconds(rank: int, meeting: str) -> tuple[float, float, float, float]:
    """Parameters, billions of bytes a second of one tensor, seconds of a step apart, together."""
    name, side = SHARED
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = build_model(name, img_size=side)[0].train()
    images = torch.randn(2, 3, side, side)
    wrapped = DistributedDataParallel(model)

    def step(synchronised: bool) -> None:
        with contextlib.nullcontext() if synchronised else wrapped.no_sync():
            wrapped(images).sum().backward()

    tensor = torch.ones(2**22)
    # With two processes, each sends and receives the tensor's bytes once.
    gb_s = BYTES_PER_VALUE * tensor.numel() / _median(lambda: dist.all_reduce(tensor)) / 1e9
    apart, together = _median(lambda: step(False)), _median(lambda: step(True))
    dist.destroy_process_group()
    return sum(p.numel() for p in model.parameters()), gb_s, apart, together


def _median(action: Callable[[], Any]) -> float:
    """Seconds of an action that both processes begin together."""
    times = []
    for number in range(ROUNDS + 2):
        dist.barrier()
        start = time.perf_counter()
        action()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[ROUNDS // 2]


if __name__ == "__main__":
    print(render_check(*check()))
