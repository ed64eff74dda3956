"""Flags that every command with a recipe shares."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from timm_xformers.recipe import Recipe, load_recipe, parse_assignments, shipped_recipes

__all__ = [
    "MODEL_HELP",
    "add_recipe_options",
    "add_run_options",
    "given_values",
    "plan_or_train",
    "positive",
    "recipe_from",
    "say_results",
]

# Flags with the name of a recipe field.
FIELDS = (
    *("model", "data", "data_dir", "labels", "classes", "limit", "epochs", "batch_size"),
    *("img_size", "seed", "output", "num_processes", "pretrained", "align_epochs"),
)
MODEL_HELP = (
    "timm name, with NAME.TAG from its weights; a run folder, local-dir:FOLDER or hf-hub:OWNER/NAME"
)


def add_recipe_options(parser: argparse.ArgumentParser, *, with_model: bool = True) -> None:
    """Add the flags from which `recipe_from` makes a recipe."""
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a shipped recipe or a YAML file")
    if with_model:
        parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument(
        "--data",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet, folder, or a timm "
        "scheme (torch/..., hfds/..., wds/...)",
    )
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the data lies")
    parser.add_argument(
        "--labels",
        metavar="FILE|COLUMN|none",
        help="CSV file of image,class for a folder of images, or a column of a Hub data set; none: "
        "a folder of images without labels, for retrofit and analyse",
    )
    parser.add_argument(
        "--classes",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="only these classes, by name or label, numbered anew in this order",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per process and forward pass"
    )
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the input")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any other settings, as YAML; may be repeated; `timm-xformers recipe` explains them",
    )
    parser.epilog = (
        f"Recipes: {', '.join(shipped_recipes())}. `timm-xformers recipe NAME` prints one, "
        "`timm-xformers recipe KEY` explains a setting."
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a training that `plan_or_train` does."""
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most N training images, evenly from all classes"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="run folder to create; default runs/MODEL-DATA-N"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and what it would cost, measured on a few steps",
    )


def plan_or_train(args: argparse.Namespace, recipe: Recipe, notes: Sequence[str] = ()) -> None:
    """Train, and say where the results are; with --dry-run, say what that would cost."""
    if args.dry_run:
        from timm_xformers.planning.dryrun import dry_run

        print(dry_run(recipe, notes))
        return
    from timm_xformers.training.train import train

    folder, _ = train(recipe, notes)
    say_results(folder)


def say_results(folder: Any) -> None:
    """Say where the results of a run are, once for all of its processes."""
    if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate launch
        print(f"Results are in {folder.root}")


def given_values(args: argparse.Namespace) -> dict[str, Any]:
    """Recipe fields that the command line sets; its flags go over its --set."""
    flags = {name: getattr(args, name, None) for name in FIELDS}
    named = {name: value for name, value in flags.items() if value is not None}
    if "data_dir" in named and "data" not in named and args.recipe is None:
        named["data"] = "folder"
    return parse_assignments(args.set) | named


def recipe_from(args: argparse.Namespace, values: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a command line; without --recipe, the shipped one named after the data.

    Args:
        args: The command line.
        values: Settings to take in place of `given_values`.
    """
    values = given_values(args) if values is None else values
    source = args.recipe
    if source is None:
        data = values.get("data", Recipe.data)
        source = data if isinstance(data, str) and data in shipped_recipes() else None
    recipe = load_recipe(source, values)
    sides = [entry["img_size"] for entry in recipe.stages if "img_size" in entry]
    if sides and "img_size" in values and "stages" not in values:
        print(
            f"note: the recipe's stages train at {', '.join(map(str, sides))} pixels, over "
            f"img_size={recipe.img_size}; --set stages=[] trains at one size.",
            file=sys.stderr,
        )
    if source is not None and "epochs" in values:
        whole = load_recipe(source, {})
        if recipe.stages != whole.stages and "stages" not in values:
            print(
                f"note: the stages of {whole.epochs} epochs were moved to fit {recipe.epochs}: "
                f"{recipe.stages}.",
                file=sys.stderr,
            )
    return recipe


def positive(text: str) -> int:
    """A flag's value that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
