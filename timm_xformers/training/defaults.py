"""What to train on somebody's own images when no model was named: minutes, not hours."""

import dataclasses
import statistics
from collections.abc import Collection

from timm_xformers.data.data import open_data
from timm_xformers.recipe import Recipe

__all__ = ["choose_model"]

# 240 to 390 images/s of training on two cores at 32 pixels, and 91.5 % on CIFAR-10.
MODEL = "ccn_4_3x2_32.cifar10"
# Side of the input by the largest usual side of the images; work grows with its square.
SIDES = ((48, 32), (96, 64), (10**9, 96))
# Images that a training sees at 32 pixels, which takes about four minutes.
IMAGES_SEEN = 60_000
LOOKED_AT = 64


def choose_model(recipe: Recipe, given: Collection[str]) -> tuple[Recipe, str]:
    """Choose a small model with weights, a size and a number of epochs; the reason in a sentence.

    Settings that are ``given`` are the user's own, and stay.

    Raises:
        UserError: The data is missing or does not fit the recipe.
    """
    # All parts, so that whatever is wrong with one is said at once.
    images = open_data(dataclasses.replace(recipe, in_memory=False)).train
    count = len(images)
    shown = min(count, LOOKED_AT)
    sizes = [images.image(number * count // shown).size for number in range(shown)]
    side = round(statistics.median(min(size) for size in sizes))
    img_size = recipe.img_size or next(size for usual, size in SIDES if side <= usual)
    seen = IMAGES_SEEN * (32 / img_size) ** 2
    chosen = {
        "model": MODEL,
        "img_size": img_size,
        "epochs": round(min(max(seen / count, 5), 40)),
        "batch_size": 2 * min(max(count // 20, 4), 32),
    }
    chosen = {name: value for name, value in chosen.items() if name not in given}
    recipe = dataclasses.replace(recipe, **chosen)  # type: ignore[arg-type]
    return recipe, (
        f"No model was named: {MODEL.partition('.')[0]} from its CIFAR-10 weights at {img_size} "
        f"pixels, for {count} images of about {side} pixels, takes minutes on a CPU; --model and "
        "--img-size choose others (timm-xformers models lists them)."
    )
