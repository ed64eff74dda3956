"""``timm-xformers benchmark``: how fast attention is beside timm's and other packages'."""

import argparse
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.settings import (
    ALLOCATORS,
    CONTENDERS,
    DTYPES,
    MODES,
    PASSES,
    PRESETS,
    SHAPES,
    Settings,
)
from timm_xformers.errors import UsageError, nearest, require_extra

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time layers or models in pairs with timm's exact attention and other packages' forms"

# Flag -> field of Settings, what its words are, help. Lists take spaces or commas.
LISTS: dict[str, tuple[str, type[Any], str]] = {
    "contenders": (
        "contenders",
        str,
        f"mechanisms as layers, default {' '.join(CONTENDERS)}; exact attention is always there",
    ),
    "models": ("models", str, "whole models instead, by timm names; one of them exact"),
    "tokens": ("tokens", int, "lengths for layers, default 64 196 256 1025 4096"),
    "img-size": ("img_sizes", int, "sides of the models' input, default each model's own"),
    "passes": (
        "passes",
        str,
        f"of {' '.join(PASSES)}; default the first two for layers, forward and train for models",
    ),
    "modes": (
        "modes",
        str,
        f"of {' '.join(MODES)}; default eager; fused is our GPU kernels, of which the others make "
        "no use",
    ),
    "dtypes": ("dtypes", str, f"of {' '.join(DTYPES)}; default float32; models use autocast"),
    "threads": (
        "threads",
        int,
        "of a process, default 1, whose processor time is the steady clock",
    ),
    "allocator": ("allocators", str, f"of {' '.join(ALLOCATORS)}: glibc's; default default"),
    "memory-tokens": ("memory_tokens", int, "lengths at which memory is measured, default all"),
}
# Flag and field -> type, help.
SINGLE: dict[str, tuple[type[Any], str]] = {
    "baseline": (str, "model to compare with; default the first exact one"),
    "shape": (str, f"of {', '.join(SHAPES)}; default S32: 128 wide, 4 heads of 32"),
    "dim": (int, "token width instead of the shape's"),
    "num-heads": (int, "heads instead of the shape's"),
    "head-dim": (int, "width of a head instead of the shape's"),
    "batch-size": (int, "sequences or images, default 8"),
    "device": (str, "cpu or cuda; default the GPU if there is one"),
    "rounds": (int, "default 7"),
    "limit-seconds": (float, "of a point, after which no fourth round begins; default 120"),
    "seed": (int, "of weights, inputs and order; default 0"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("--preset", metavar="NAME", help=f"of {', '.join(PRESETS)}; flags go over")
    for flag, (field, kind, text) in LISTS.items():
        parser.add_argument(
            f"--{flag}", dest=field, type=_words(kind), nargs="+", metavar="X", help=text
        )
    for flag, (kind, text) in SINGLE.items():
        parser.add_argument(f"--{flag}", type=kind, metavar="X", help=text)
    parser.add_argument("--no-peers", action="store_true", help="without other packages")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="benchmark",
        help="folder to create; default benchmark",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, and print the tables."""
    require_extra("train", "accelerate", "matplotlib", "numpy")
    values: dict[str, Any] = {}
    if args.preset is not None:
        if args.preset not in PRESETS:
            raise UsageError(
                f"There is no preset {args.preset!r}{nearest(args.preset, PRESETS)}; choose from "
                f"{', '.join(PRESETS)}."
            )
        values = dict(PRESETS[args.preset])
    for field, _, _ in LISTS.values():
        if getattr(args, field) is not None:
            values[field] = [word for words in getattr(args, field) for word in words]
    for flag in SINGLE:
        field = flag.replace("-", "_")
        if getattr(args, field) is not None:
            values[field] = getattr(args, field)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for flag in ("peers", "memory"):
        if getattr(args, f"no_{flag}"):
            values[flag] = False
    settings = Settings(output=Path(args.output), **values)
    from timm_xformers.benchmarking.benchmark import Benchmark

    print(Benchmark(settings).run().read_text(encoding="utf-8"), end="")


def _words(kind: type[Any]) -> Any:
    """A type for argparse: words between commas."""

    def read(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",") if word]

    read.__name__ = f"{kind.__name__} list"  # argparse names it when a word is none
    return read
