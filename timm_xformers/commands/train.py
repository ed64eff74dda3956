"""``timm-xformers train``: train a model and leave a folder of results."""

import argparse
from pathlib import Path

from timm_xformers.commands.options import (
    add_recipe_options,
    add_run_options,
    given_values,
    plan_or_train,
    recipe_from,
    say_results,
)
from timm_xformers.errors import UsageError, require_extra
from timm_xformers.recipe import Recipe, shipped_recipes

HELP = "train a model; without arguments, the default model on the embedded digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    add_recipe_options(parser)
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start from the model's weights, or not; by default if its name carries some "
        "(NAME.TAG, a folder, the Hub)",
    )
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="refuse to run with more or fewer processes"
    )
    add_run_options(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run from its last checkpoint, exactly",
    )


def run(args: argparse.Namespace) -> None:
    """Train, and say where the results are."""
    require_extra("train", "accelerate", "matplotlib", "tqdm")
    if args.resume is None:
        plan_or_train(args, *_recipe_and_notes(args))
        return
    if args.dry_run:
        raise UsageError("--dry-run shows a run before it starts; drop it, or drop --resume.")
    changes = given_values(args)
    changes.pop("data", None)  # implied by --data-dir
    others = sorted(set(changes) - {"data_dir", "num_workers"})
    if others or args.recipe or args.data:
        given = ", ".join(others) or "recipe or data"
        raise UsageError(
            f"--resume goes on with the run's own recipe and cannot change {given}; only "
            "--data-dir and --set num_workers=N may go with it."
        )
    from timm_xformers.training.train import resume

    folder, _ = resume(Path(args.resume), **changes)
    say_results(folder)


def _recipe_and_notes(args: argparse.Namespace) -> tuple[Recipe, list[str]]:
    """The recipe, and the reason for what nobody chose: a model for somebody's own images."""
    recipe = recipe_from(args)
    values = given_values(args)
    if args.recipe or "model" in values or recipe.data in shipped_recipes():
        return recipe, []
    from timm_xformers.training.defaults import choose_model

    recipe, reason = choose_model(recipe, values)
    return recipe, [reason]
