"""``timm-xformers evaluate``: figures of a model on a data set."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from timm_xformers.commands.options import add_recipe_options, given_values
from timm_xformers.errors import UsageError, require_extra
from timm_xformers.recipe import NO_LABELS, Recipe, load_recipe

__all__ = ["HELP", "add_arguments", "recipe_of", "run"]

HELP = "measure a model's accuracy with its 95-percent interval, or mAP"
# What a run folder says of its data, for evaluating it on that.
DATA_FIELDS = (
    *("data", "data_dir", "labels", "train_split", "val_split", "test_split", "classes"),
    *("val_fraction", "unreadable", "in_memory", "num_workers"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "run_or_model",
        nargs="?",
        metavar="MODEL",
        help="a run folder, whose own data is taken if no other is named, or as --model",
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights for --model, instead of its published ones"
    )
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--skip-unknown-classes",
        action="store_true",
        help="leave out images of classes that the model does not know, instead of stopping",
    )
    parser.add_argument(
        "--details",
        metavar="FOLDER",
        help="write per_class.csv and, of one class an image, confusion.png there",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the record to this JSON file")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the record as JSON alone; without a terminal, that is what stdout gets anyway",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate; say the figures in a line, and print the record for programs."""
    require_extra("train", "accelerate", *([] if args.details is None else ["matplotlib"]))
    values = given_values(args)
    output = values.pop("output", None)
    recipe = recipe_of(args, values)
    from timm_xformers.predicting.evaluate import evaluate

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    record = evaluate(
        recipe,
        args.split,
        None if args.checkpoint is None else Path(args.checkpoint),
        None if args.details is None else Path(args.details),
        skip_unknown=args.skip_unknown_classes,
        say=say,
    )
    if not args.json:
        say(_line(args.split, record))
    if args.json or not sys.stdout.isatty():
        print(json.dumps(dataclasses.asdict(record), indent=2))
    if output is not None:
        record.save(Path(output))


def recipe_of(args: argparse.Namespace, values: dict[str, Any]) -> Recipe:
    """Model and data; nothing else is taken from a shipped recipe: training is over."""
    if args.run_or_model is not None:
        if "model" in values:
            raise UsageError(f"{args.run_or_model} and --model name two models; drop one.")
        values["model"] = args.run_or_model
    if "model" not in values and args.recipe is None:
        raise UsageError("Name a model: evaluate RUN, or --model with any timm name.")
    recipe = load_recipe(args.recipe, values)
    _, colon, folder = recipe.model.partition(":")
    own = Path(folder).parent / "recipe.yaml"
    if colon and args.recipe is None and not {"data", "data_dir"} & {*values} and own.is_file():
        trained = dataclasses.asdict(load_recipe(str(own), {}))
        fields = [*DATA_FIELDS, "teacher"] if trained["labels"] == NO_LABELS else DATA_FIELDS
        recipe = load_recipe(None, {name: trained[name] for name in fields} | values)
    return recipe


def _line(split: str, record: Any) -> str:
    images, loss = (getattr(record, f"{split}_{name}") for name in ("images", "loss"))
    return (
        f"{record.model} on {record.data}, {split}: {record.figures(split)}, loss {loss}, "
        f"{images} images at {record.images_per_s:.0f} images/s"
    )
