"""A training step on large images in limited memory: ``python tests/models/large_images.py``.

Prints the table of docs/speed.md, section "Large images". Every step (forward, cross-entropy,
backward, AdamW) runs in a process of its own on one thread; after its imports and a step on small
images, its address space may grow by ``--limit-mib``, beyond which PyTorch's allocator fails.
Linux only.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch
from timm.layers import set_fused_attn
from torch.nn import functional as F

import timm_xformers.models  # noqa: F401  (registers the models where autoload is off)
from timm_xformers.benchmarking.memory import memory_marks

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MIB = 5120
# Side of the image, side of a patch, batch.
IMAGES = [(224, 4, 4), (512, 8, 2)]
# timm's own ViT-Tiny; the others are ours, the same trunk by another attention.
UNFUSED, FUSED = "exact, unfused", "exact, fused"
EFFICIENT = ["performer_relu_m64", "performer_softmax_m64", "nystrom_l64", "linformer_k256"]
EFFICIENT += ["local2d_w8", "local2d_w8_shifted"]


def measure(side, patch, batch, attention, limit_mib=None):
    """The step in a process of its own.

    Returns:
        ``peak_mib`` above what was held before, or ``error``: what the allocator said.
    """
    job = {"side": side, "patch": patch, "batch": batch, "attention": attention}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps({**job, "limit_mib": limit_mib})],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if result.returncode:
        raise RuntimeError(f"{attention} ended with {result.returncode}: {result.stderr[-2000:]}")
    return json.loads(result.stdout)


def run_job(side, patch, batch, attention, limit_mib):
    torch.manual_seed(0)
    set_fused_attn(attention != UNFUSED)
    train_step(32, 16, 1, attention)  # what is loaded at first use is not the step's
    if limit_mib is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    before, peak = memory_marks("cpu")
    try:
        loss = train_step(side, patch, batch, attention)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return {"error": str(error).splitlines()[0]}
    assert loss == loss, "the loss is not a number"
    return {"peak_mib": round((peak() - before) / 2**20)}


def train_step(side, patch, batch, attention):
    if attention in (UNFUSED, FUSED):
        name, arguments = "vit_tiny_patch16_224", {}
    else:
        name, arguments = "vix_tiny_patch16_224_performer_relu_m64", {"attn_layer": attention}
    model = timm.create_model(name, img_size=side, patch_size=patch, **arguments)
    optimizer = torch.optim.AdamW(model.parameters())
    logits = model(torch.randn(batch, 3, side, side))
    loss = F.cross_entropy(logits, torch.randint(1000, (batch,)))
    loss.backward()
    optimizer.step()
    return loss.item()


def print_table(limit_mib, needs):
    heads = [
        f"{side} pixels, patch {patch}: {(side // patch) ** 2:,} tokens, batch {batch}"
        for side, patch, batch in IMAGES
    ]
    print(f"| attention | {' | '.join(heads)} |")
    print(f"| --- |{' ---: |' * len(heads)}")
    for attention in [UNFUSED, FUSED, *EFFICIENT]:
        cells = [peak_of(case, attention, limit_mib, needs) for case in IMAGES]
        print(f"| {attention} | {' | '.join(cells)} |", flush=True)


def peak_of(case, attention, limit_mib, needs):
    found = measure(*case, attention, limit_mib)
    if "peak_mib" in found:
        return f"{found['peak_mib']:,}"
    takes = f"; takes {measure(*case, attention)['peak_mib']:,}" if needs else ""
    return f"fails at {limit_mib:,}{takes}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-mib", type=int, default=LIMIT_MIB, metavar="N")
    parser.add_argument(
        "--needs", action="store_true", help="what failed once more without limit (up to 8.5 GiB)"
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(**args.job)))
    else:
        print_table(args.limit_mib, args.needs)
