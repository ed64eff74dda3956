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

HELP = "time attention layers or models against timm's exact attention and other packages"

# Flag -> field of Settings, type of an entry, help. Lists take spaces or commas.
LISTS: dict[str, tuple[str, type[Any], str]] = {
    "contenders": (
        "contenders",
        str,
        f"mechanisms to time as layers, default {' '.join(CONTENDERS)}; the baseline, exact "
        "attention, is always timed too",
    ),
    "models": ("models", str, "whole models instead of layers, by timm names"),
    "tokens": ("tokens", int, "sequence lengths of layers, default 64 196 256 1025 4096"),
    "img-size": ("img_sizes", int, "image sizes of models in pixels, default each model's own"),
    "passes": (
        "passes",
        str,
        f"of {' '.join(PASSES)} (train: forward, backward and AdamW); default forward backward "
        "for layers, forward train for models",
    ),
    "modes": (
        "modes",
        str,
        f"of {' '.join(MODES)} (fused: our Triton kernels, which the other modes do not use); "
        "default eager",
    ),
    "dtypes": ("dtypes", str, f"of {' '.join(DTYPES)}, models by autocast; default float32"),
    "threads": ("threads", int, "CPU threads, default 1, timed by CPU time; more, by wall clock"),
    "allocator": ("allocators", str, f"settings of glibc's allocator, of {' '.join(ALLOCATORS)}"),
    "memory-tokens": (
        "memory_tokens",
        int,
        "lengths whose peak memory is measured, default all",
    ),
}
# Flag and field -> type, help.
SINGLE: dict[str, tuple[type[Any], str]] = {
    "baseline": (str, "model that speed-ups are relative to; default the first exact one"),
    "shape": (
        str,
        f"of {', '.join(SHAPES)}; default S32: 128 wide, 4 heads of 32",
    ),
    "dim": (int, "token width, instead of the shape's"),
    "num-heads": (int, "number of heads, instead of the shape's"),
    "head-dim": (int, "width of a head, instead of the shape's"),
    "batch-size": (int, "sequences or images, default 8"),
    "device": (str, "cpu or cuda; default the GPU if there is one"),
    "rounds": (int, "repetitions, default 7; in each, every contender runs once, in random order"),
    "limit-seconds": (float, "time limit of a setting, after three rounds; default 120"),
    "seed": (int, "of weights, inputs and order, default 0"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings by name, of {', '.join(PRESETS)}; flags override them",
    )
    for flag, (field, kind, text) in LISTS.items():
        parser.add_argument(
            f"--{flag}", dest=field, type=_words(kind), nargs="+", metavar="X", help=text
        )
    for flag, (kind, text) in SINGLE.items():
        parser.add_argument(f"--{flag}", type=kind, metavar="X", help=text)
    parser.add_argument("--no-peers", action="store_true", help="leave other packages out")
    parser.add_argument("--no-memory", action="store_true", help="measure no peak memory")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="benchmark",
        help="folder to create, or to go on in after an interruption; default benchmark",
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
