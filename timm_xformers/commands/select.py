"""``timm-xformers select``: choose a recipe by cross-validation, train the best, test once."""

import argparse

from timm_xformers.commands.options import add_recipe_options, recipe_from
from timm_xformers.errors import UsageError, require_extra

HELP = "choose a recipe by cross-validation over a grid or by Optuna, train the best, test once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    add_recipe_options(parser)
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument(
        "--space",
        required=True,
        metavar="NAME|FILE",
        help="what varies: a YAML file with grid or search, folds, trials and pruner",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder to create, or to go on in with the same command; default "
        "runs/select-MODEL-DATA",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the work"
    )
    parser.add_argument(
        "--no-final", action="store_true", help="stop when the best is known; test nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Select, and say what was chosen."""
    require_extra("train", "accelerate", "filelock", "matplotlib", "sklearn", "tqdm")
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers} is out of range; use 1 or more.")
    recipe = recipe_from(args)
    from timm_xformers.studies.selecting.space import load_space

    space = load_space(args.space, recipe)
    from timm_xformers.studies.selecting.selection import select

    search, best = select(recipe, space, workers=args.workers, final=not args.no_final)
    print(f"Best is {best.label}; the table is in {search.markdown}, the recipe in {search.best}")
