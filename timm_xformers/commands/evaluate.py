"""``timm-xformers evaluate``: figures of a model on a data set."""

import argparse
import dataclasses
import json
from pathlib import Path

from timm_xformers.commands.options import add_recipe_options, given_values
from timm_xformers.errors import UsageError, require_extra
from timm_xformers.recipe import load_recipe

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure a model's accuracy, with its 95 %% interval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    add_recipe_options(parser)
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights for --model, instead of its published ones"
    )
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--details",
        metavar="FOLDER",
        help="write per_class.csv and confusion.png, which class was taken for which, there",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the record to this JSON file")


def run(args: argparse.Namespace) -> None:
    """Evaluate, and print the record."""
    require_extra("train", "accelerate", *([] if args.details is None else ["matplotlib"]))
    values = given_values(args)
    output = values.pop("output", None)
    if "model" not in values and args.recipe is None:
        raise UsageError("Name a model: --model local-dir:RUN/best, or any timm name.")
    # Without --recipe nothing but the data is taken from a shipped one: training is over.
    recipe = load_recipe(args.recipe, values)
    from timm_xformers.predicting.evaluate import evaluate

    record = evaluate(
        recipe,
        args.split,
        None if args.checkpoint is None else Path(args.checkpoint),
        None if args.details is None else Path(args.details),
    )
    print(json.dumps(dataclasses.asdict(record), indent=2))
    if output is not None:
        record.save(Path(output))
