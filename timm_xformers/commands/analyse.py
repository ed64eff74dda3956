"""``timm-xformers analyse``: what cheaper attention would cost a model, without training it."""

import argparse
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.settings import DTYPES
from timm_xformers.commands.evaluate import recipe_of
from timm_xformers.commands.options import given_values, positive
from timm_xformers.errors import require_extra

HELP = "measure what cheaper attention would cost a trained model, and propose which blocks get it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "run_or_model",
        metavar="MODEL",
        help="timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, or a run folder, whose own data is "
        "taken if no other is named",
    )
    parser.add_argument(
        "--mechanisms",
        required=True,
        type=_words,
        metavar="A,B,...",
        help="what to try in its blocks; `timm-xformers models --attention` lists all",
    )
    parser.add_argument("--data", help="as for evaluate: digits, cifar10, folder, ...")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the data lies")
    parser.add_argument(
        "--labels", metavar="FILE|COLUMN|none", help="as for evaluate; none: images without labels"
    )
    parser.add_argument(
        "--split",
        choices=("val", "train"),
        default="val",
        help="whose images, default val; never test, by which nothing may be chosen",
    )
    parser.add_argument("--images", type=positive, default=256, metavar="N", help="default 256")
    parser.add_argument(
        "--img-size",
        dest="img_sizes",
        type=_sizes,
        default=(),
        metavar="224,448,...",
        help="image sizes to time, default the model's own; losses are at the model's own",
    )
    parser.add_argument(
        "--budget",
        metavar="2x|memory:2x",
        help="propose a mechanism per block that is so many times as fast, or takes so many times "
        "less memory, at the largest size",
    )
    parser.add_argument(
        "--most-exact",
        type=_count,
        default=4,
        metavar="N",
        help="blocks that a proposal may leave as they are, default 4",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per pass for the losses"
    )
    parser.add_argument(
        "--time-batch", type=positive, default=1, metavar="N", help="of timed passes, default 1"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="of the process, default 1"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of timed passes, by autocast"
    )
    parser.add_argument(
        "--rounds", type=positive, default=7, metavar="N", help="of timed passes, default 7"
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="time limit of a size, after three rounds; default 120",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of random features and of the order, default 0"
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
        help="any other settings of model and data, as for evaluate",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FOLDER", default="analysis", help="folder to create, default analysis"
    )
    parser.set_defaults(recipe=None)


def run(args: argparse.Namespace) -> None:
    """Analyse, and print the tables."""
    require_extra("train", "accelerate", "matplotlib", "scipy")
    from timm_xformers.analysing.analyse import Analysis, analyse
    from timm_xformers.analysing.search import read_budget

    values: dict[str, Any] = given_values(args)
    values.pop("output", None)
    analysis = Analysis(
        recipe=recipe_of(args, values),
        budget=None if args.budget is None else read_budget(args.budget),
        output=Path(args.output),
        **{
            name: getattr(args, name)
            for name in (
                *("mechanisms", "split", "images", "img_sizes", "time_batch", "threads", "dtype"),
                *("rounds", "limit_seconds", "most_exact"),
            )
        },
    )
    print(analyse(analysis))
    print(f"All of it is in {args.output}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(word) for word in text.split(",")}))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
