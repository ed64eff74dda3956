"""What the arms of a study cost: speed side by side, memory in processes of their own, operations.

The arms take turns in shuffled rounds, and the ratios to the baseline are of one round each, so
that what disturbs the machine disturbs all alike. A training step is forward, cross-entropy,
backward and AdamW, the same for all arms; making batches is not in it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from timm_xformers.benchmarking.benchmark import measure
from timm_xformers.benchmarking.compare import Summary, is_void, main_clock, ratios, summarise
from timm_xformers.benchmarking.settings import Contender, Point
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.planning import catalog
from timm_xformers.records.results_json import Record, origin
from timm_xformers.studies.running.definition import Arm, Study
from timm_xformers.studies.running.folder import StudyFolder

__all__ = ["measure_costs", "read_costs"]

EFFORT = {"rounds": 9, "min_ms": 200.0, "limit_seconds": 600.0, "seed": 0}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
TASKS = {"train": "train", "infer": "forward"}


def measure_costs(study: Study, root: Path, threads: int) -> tuple[Path, list[str]]:
    """Measure all arms for the input that finished runs have, and store it.

    Returns:
        The file written, and why figures are missing or not to be trusted.

    Raises:
        UserError: No run of a data set is finished, or nothing could be measured.
    """
    folder = StudyFolder(root)
    finished = folder.finished(study)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content: dict[str, Any] = {**origin(torch.device(device)), "threads": threads}
    content |= {"effort": EFFORT, "data": {}}
    notes: list[str] = []
    for data in study.data:
        found = [run.record for run in finished.values() if run.record.data == data]
        if not found:
            raise UserError(
                f"No run on {data} is finished in {folder.records}; costs are measured for the "
                "input that a record names, so finish one first."
            )
        content["data"][data] = _of_data(study, found[0], device, threads, folder, notes)
    write_text(folder.costs, json.dumps(content, indent=1) + "\n")
    return folder.costs, notes


def read_costs(folder: StudyFolder, study: Study) -> dict[str, Any]:
    """What was measured; empty if nothing was, or for arms that have other arguments now."""
    if not folder.costs.is_file():
        return {}
    content: dict[str, Any] = json.loads(folder.costs.read_text(encoding="utf-8"))
    for entry in content["data"].values():
        entry["arms"] = {
            arm.name: entry["arms"][arm.name]
            for arm in study.arms
            if _identity(study, arm) == entry["arms"].get(arm.name, {}).get("identity")
        }
    return content


def _identity(study: Study, arm: Arm) -> dict[str, Any]:
    return {"model": arm.model, "model_kwargs": study.recipe.model_kwargs | arm.model_kwargs}


def _of_data(
    study: Study, record: Record, device: str, threads: int, folder: StudyFolder, notes: list[str]
) -> dict[str, Any]:
    recipe = study.recipe
    last: dict[str, Any] = recipe.stages[-1] if recipe.stages else {}
    batch = int(last.get("batch_size", recipe.batch_size))
    share = last.get("patch_drop_rate", recipe.patch_drop_rate)
    shared: dict[str, Any] = {"in_chans": record.in_chans, "num_classes": record.num_classes}
    mode = "compiled" if recipe.compile else "eager"
    points = {
        name: Point(
            kind="model",
            size=record.img_size,
            batch_size=batch,
            task=task,
            dtype=DTYPES[recipe.mixed_precision],
            device=device,
            threads=threads,
            allocator="default",
        )
        for name, task in TASKS.items()
    }

    def contender(arm: Arm, task: str) -> Contender:
        kwargs = _identity(study, arm)["model_kwargs"] | shared
        if share and task == "train":
            kwargs["patch_drop_rate"] = share
        return Contender(name=arm.model, mode=mode, title=arm.name, kwargs=kwargs)

    arms: dict[str, dict[str, Any]] = {}
    for arm in study.arms:
        kwargs = contender(arm, "infer").kwargs
        model = catalog.build_empty(arm.model, record.img_size, **kwargs)
        size = catalog.measure(arm.name, model, record.img_size, 2, in_chans=record.in_chans)
        arms[arm.name] = {
            "identity": _identity(study, arm),
            "params": size.params,
            "gmacs": size.gmacs,
            "tokens": size.tokens,
        }
    log = folder.root / "costs.txt"
    work = [(point, [contender(a, name) for a in study.arms]) for name, point in points.items()]
    clock = main_clock(points["train"])
    for name, found in zip(points, measure("time", work, EFFORT, log), strict=True):
        notes += [f"{arm}, {name}: {why}" for arm, why in found["left_out"].items()]
        seconds = {arm: clocks[clock] for arm, clocks in found["seconds"].items()}
        for arm, own in seconds.items():
            arms[arm] |= _speed(name, batch, own, seconds.get(study.baseline), arm, notes)
    alone = [(points["train"], [contender(arm, "train")]) for arm in study.arms]
    for arm, found in zip(study.arms, measure("memory", alone, EFFORT, log), strict=True):
        if "peak_mib" in found:
            arms[arm.name]["peak_mib"] = found["peak_mib"]
        else:
            notes.append(f"{arm.name}, memory: {found['left_out']}")
    return {
        "img_size": record.img_size,
        "batch_size": batch,
        "dtype": points["train"].dtype,
        "mode": mode,
        "clock": clock,
        "arms": arms,
    }


def _speed(
    name: str,
    batch: int,
    own: list[float],
    reference: list[float] | None,
    arm: str,
    notes: list[str],
) -> dict[str, Any]:
    """Images a second with the quartiles of the rounds, and times as fast as the baseline."""
    times = summarise(own)
    if is_void(times):
        notes.append(f"{arm}, {name}: the rounds were not steady, so the machine was not quiet")
    entry = {f"{name}_img_s": [_digits(batch / s) for s in (times.median, times.q3, times.q1)]}
    if reference is not None:
        ratio: Summary = ratios(reference, own)
        entry[f"{name}_ratio"] = [_digits(value) for value in (ratio.median, ratio.q1, ratio.q3)]
    return entry | {f"{name}_steady": not is_void(times)}


def _digits(value: float) -> float:
    """Four digits: more are noise."""
    return round(value, 3 - math.floor(math.log10(value)))
