"""``timm-xformers benchmark``: how fast attention is beside timm's and other packages'."""

import argparse
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.settings import (
    PRESETS,
    Settings,
    flags,
)
from timm_xformers.errors import UsageError, nearest, require_extra

HELP = "time attention layers or models against timm's exact attention and other packages"

FLAGS = flags()
# Those with several values, between spaces or commas.
LISTS = {flag: field for flag, field in FLAGS.items() if str(field.type).startswith("tuple")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings by name, of {', '.join(PRESETS)}; flags override them",
    )
    for flag, field in (LISTS | FLAGS).items():
        kind, several = field.metadata["kind"], flag in LISTS
        parser.add_argument(
            f"--{flag}",
            dest=field.name,
            type=_words(kind) if several else kind,
            nargs="+" if several else None,
            metavar="X",
            help=field.metadata["meaning"],
        )
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
    for flag, field in FLAGS.items():
        given = getattr(args, field.name)
        if given is not None:
            values[field.name] = (
                [word for words in given for word in words] if flag in LISTS else given
            )
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
