"""``timm-xformers retrofit``: put another attention into a trained model, and repair it."""

import argparse
from typing import Any

from timm_xformers.commands.options import (
    MODEL_HELP,
    add_recipe_options,
    add_run_options,
    given_values,
    plan_or_train,
    recipe_from,
)
from timm_xformers.errors import UsageError, require_extra
from timm_xformers.recipe import Recipe, load_recipe, parse_assignments, shipped_recipes

HELP = "replace the attention of a trained model by a cheaper one, and repair what that broke"
RECIPE = "retrofit"
# How a data set's own recipe changes its pixels, which depends on what the images show.
AUGMENTATION = (
    *("hflip", "re_prob", "crop_pad", "rotate_degrees", "shear_degrees", "zoom", "cutout"),
    *("rand_augment", "min_crop_area", "color_jitter", "auto_augment"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"the model, which has weights: {MODEL_HELP}"
    )
    parser.add_argument(
        "--mechanism",
        metavar="NAME|MAPPING",
        help="what to put in (timm-xformers models --attention lists the names), or a mapping from "
        'blocks to names, such as \'{"0-1,11": softmax, "2-10": performer_softmax_m64}\'',
    )
    parser.add_argument(
        "--blocks",
        metavar="0-1,11",
        help="the blocks to replace, counted from 0; the others stay as they are; default: all",
    )
    add_recipe_options(parser, with_model=False)
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of the repair; 0 replaces, and repairs nothing"
    )
    parser.add_argument(
        "--align-epochs",
        type=int,
        metavar="N",
        help="the first of them, which match each replaced layer with the one before it, alone",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    """Replace and repair, and say where the results are."""
    require_extra("train", "accelerate", "matplotlib", "tqdm")
    plan_or_train(args, _recipe(args))


def _recipe(args: argparse.Namespace) -> Recipe:
    """What `train` would be given: a recipe with replace and teacher."""
    given = given_values(args)
    settings: dict[str, Any] = {"model": args.model, "teacher": args.model, "pretrained": True}
    if args.recipe is None:
        args.recipe = RECIPE
        settings["replace"] = {}  # the recipe's own is an example
        data = given.get("data", load_recipe(RECIPE, {}).data)
        if data in shipped_recipes():
            pixels = load_recipe(data, {})
            settings |= {name: getattr(pixels, name) for name in AUGMENTATION}
    if args.mechanism is not None:
        found = parse_assignments([f"mechanism={args.mechanism}"])
        settings["replace.mechanism"] = found["mechanism"]
    if args.blocks is not None:
        settings["replace.blocks"] = args.blocks
    recipe = recipe_from(args, settings | given)
    if not recipe.replace.get("mechanism"):
        raise UsageError(
            "retrofit needs --mechanism NAME, such as performer_softmax_m64; `timm-xformers models "
            "--attention` lists the names."
        )
    return recipe
