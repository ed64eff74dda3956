"""Evidence for docs/retrofit.md: token merging, speed and memory beside a teacher, and the tables.

    python -m tools.retrofit_proof merging TEACHER --source FOLDER --data-dir FOLDER --output FILE
    python -m tools.retrofit_proof speed TEACHER --source FOLDER --output FILE
    python -m tools.retrofit_proof plots

The tables are written with the other generated files (`tools.write_cards`).

Token merging (Bolya et al., arXiv:2210.09461) is measured as its authors published it: FOLDER is a
copy of their repository, of which nothing is kept here. It patches timm's own attention, so the
teacher's weights are put into that first, and the two are compared.
"""

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from timm_xformers.benchmarking.memory import memory_marks
from timm_xformers.benchmarking.timing import HostStopwatch, run_rounds
from timm_xformers.data.data import make_batches
from timm_xformers.files.atomic import write_text
from timm_xformers.predicting.evaluate import open_published
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import environment
from timm_xformers.replace import attention_sites, replace_attention
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.metrics import Metrics, evaluate_model
from tools.checkout import this_checkout
from tools.retrofit_page import read_evidence, retrofit_plot

__all__ = ["main"]

Model = Any


def with_timms_attention(model: Model) -> Model:
    """A copy of a model whose exact attention is timm's own layer with the same weights."""
    twin = copy.deepcopy(model)
    for site in attention_sites(twin):
        ours: Any = site.module
        theirs = Attention(ours.qkv.in_features, ours.num_heads, qkv_bias=ours.qkv.bias is not None)
        theirs.load_state_dict(ours.state_dict())
        twin.set_submodule(site.name, theirs)
    return twin.eval()


def merging(model: Model, source: Path, removed: int) -> Model:
    """A copy of a model that merges so many tokens in every block, by the published code."""
    sys.path.insert(0, str(source))
    tome: Any = importlib.import_module("tome")

    twin = with_timms_attention(model)
    tome.patch.timm(twin)
    twin.r = removed
    return twin


def measure_merging(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and agreement with the teacher, by tokens merged in each block."""
    recipe = Recipe(
        model=args.teacher, data=args.data, data_dir=args.data_dir, batch_size=args.batch_size
    )
    teacher, data, preprocessing = open_published(recipe, "test")
    assert data.test is not None
    accelerator = make_accelerator("no")
    batches = make_batches(
        data.test,
        recipe,
        preprocessing,
        in_memory=data.in_memory,
        training=False,
        device=accelerator.device,
    )
    rows = []
    for removed in args.removed:
        model = merging(teacher, args.source, removed)
        found = evaluate_model(model, batches, args.batch_size, accelerator, teacher)
        assert isinstance(found, Metrics)
        rows.append(
            {
                "removed_per_block": removed,
                "top1_percent": 100 * found.top1 / found.images,
                "agreement_percent": 100 * (found.agreed or 0) / found.images,
                "teacher_top1_percent": 100 * (found.teacher_top1 or 0) / found.images,
                "images": found.images,
            }
        )
        print(rows[-1], flush=True)
    return {"data": args.data, "rows": rows, **environment(accelerator)}


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Processor time of an image and peak memory of a pass, at growing sizes, in one thread.

    Contenders of a size take turns; a ratio is the median over the rounds of teacher by contender.
    """
    torch.set_num_threads(1)
    rows = []
    for size in args.img_sizes:
        teacher: Model = timm.create_model(args.teacher, pretrained=True).eval()
        own = teacher.patch_embed.img_size[0]
        teacher.set_input_size(img_size=(size, size))
        images = torch.randn(1, 3, size, size)
        contenders: dict[str, Model] = {"teacher": teacher}
        for name in args.mechanisms:
            contenders[name] = copy.deepcopy(teacher)
            blocks = name.partition("@")[2] or None
            replace_attention(contenders[name], name.partition("@")[0], blocks=blocks)
        for removed in args.removed:
            # The same share of the tokens as at the teacher's own size.
            share = removed * (size // own) ** 2
            contenders[f"merging {removed}"] = merging(teacher, args.source, share)
        steps = {name: _step(model, images) for name, model in contenders.items()}
        memory = {name: _peak(step) for name, step in steps.items()}  # before this process has any
        for step in steps.values():
            step()
        times = run_rounds(
            steps,
            dict.fromkeys(steps, 1 if size > own else 4),
            HostStopwatch(threads=1),
            rounds=args.rounds,
            limit_seconds=args.limit_seconds,
            seed=0,
        )
        exact = times["teacher"]["cpu"]
        for name, clocks in times.items():
            ratios = [before / now for before, now in zip(exact, clocks["cpu"], strict=True)]
            rows.append(
                {
                    "contender": name,
                    "img_size": size,
                    "images_per_s": 1 / statistics.median(clocks["cpu"]),
                    "times_as_fast": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "rounds": len(ratios),
                    "peak_mib": memory[name] / 2**20,
                }
            )
            print(rows[-1], flush=True)
    return {"clock": "cpu", "threads": 1, "rows": rows, **environment(make_accelerator("no"))}


def _step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def step() -> None:
        model(images)

    return step


def _peak(step: Callable[[], None]) -> int:
    """Bytes of the first pass, beyond what was held before, in a process of its own."""
    near, far = os.pipe()
    if not (child := os.fork()):
        before, peak = memory_marks("cpu")
        step()
        os.write(far, str(peak() - before).encode())
        os._exit(0)
    os.close(far)
    with os.fdopen(near) as answer:
        found = int(answer.read())
    os.waitpid(child, 0)
    return found


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    for name in ("merging", "speed"):
        task = tasks.add_parser(name)
        task.add_argument("teacher", help="local-dir:FOLDER")
        task.add_argument("--source", type=Path, required=True)
        task.add_argument("--removed", type=int, nargs="*", default=[])
        task.add_argument("--output", type=Path, required=True)
        if name == "merging":
            task.add_argument("--data", required=True)
            task.add_argument("--data-dir")
            task.add_argument("--batch-size", type=int, default=8)
        else:
            task.add_argument("--mechanisms", nargs="*", default=[])
            task.add_argument("--img-sizes", type=int, nargs="+", required=True)
            task.add_argument("--rounds", type=int, default=5)
            task.add_argument("--limit-seconds", type=float, default=200)
    tasks.add_parser("plots")
    args = parser.parse_args()
    if args.task == "plots":
        checkout = this_checkout()
        for folder in checkout.retrofits():
            path = checkout.root / "docs" / "retrofit" / f"{folder.name}.png"
            retrofit_plot(read_evidence(folder), path, folder.name)
        return 0
    found = measure_merging(args) if args.task == "merging" else measure_speed(args)
    write_text(args.output, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
