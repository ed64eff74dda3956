"""``timm-xformers plan``: what a training run would cost on 1 to 64 GPUs."""

import argparse
import sys
from typing import Any

HELP = "estimate time, memory, data rate and cost of a training on 1 to 64 GPUs"

# Fields of scaling.Job and scaling.Cluster, whose defaults hold: flag, type, help.
JOB: tuple[tuple[str, Any, str], ...] = (
    ("epochs", int, "epochs, default 300"),
    ("train_images", int, "training images, default ImageNet-1k's"),
    ("val_images", int, "validation images, default ImageNet-1k's"),
    ("kb_per_image", float, "thousands of bytes of an image's file, default ImageNet-1k's 115.4"),
    ("batch_size", int, "images per GPU and update, default 128"),
)
CLUSTER: tuple[tuple[str, Any, str], ...] = (
    ("peak_tflops", float, "peak of one GPU, default 989: an H100 or H200 in dense bf16"),
    ("utilisation", float, "share of the peak that training reaches, default 0.35, assumed"),
    ("gpus_per_node", int, "GPUs in one machine, default 8"),
    ("node_gb_s", float, "GB/s between GPUs of a machine, default 300, assumed"),
    ("network_gb_s", float, "GB/s per GPU between machines, default 40, assumed"),
    ("latency_us", float, "microseconds an all-reduce takes per GPU in it, default 20, assumed"),
    ("price_per_gpu_hour", float, "in any currency, default 3, an example"),
    ("cores_per_gpu", float, "CPU cores that decode for a GPU, default 16, assumed"),
    ("decode_img_s", float, "images a core decodes a second, default 100, assumed"),
    ("storage_mb_s", float, "MB/s that the storage gives, default 10000, assumed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "--model", default="vit_small_patch16_224", help="any timm model; default %(default)s"
    )
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="default: the model's own")
    parser.add_argument("--float32", action="store_true", help="no mixed precision")
    parser.add_argument("--no-ema", action="store_true", help="no averaged weights")
    parser.add_argument(
        "--grad-checkpointing", action="store_true", help="one more forward pass; memory as without"
    )
    for name, kind, text in (*JOB, *CLUSTER):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar="N", help=text)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from timm_xformers.planning.scaling import Cluster, Job, costs_of, estimate, render

    def given(fields: tuple[tuple[str, Any, str], ...]) -> dict[str, Any]:
        values = {name: getattr(args, name) for name, _, _ in fields}
        return {name: value for name, value in values.items() if value is not None}

    costs = costs_of(args.model, args.img_size, bf16=not args.float32)
    job = Job(**given(JOB), ema=not args.no_ema, grad_checkpointing=args.grad_checkpointing)
    cluster = Cluster(**given(CLUSTER))
    print(render(estimate(costs, job, cluster)))
    print(
        f"{costs.name} at {costs.img_size} pixels: {costs.params:,} parameters, "
        f"{costs.gmacs:.2f} GMACs and {costs.activation_mib:.1f} MiB kept per image. Nothing was "
        f"measured; assumed are {cluster}.",
        file=sys.stderr,
    )
