"""A picture of what models look at: a row per model, the image as it saw it, a map per block."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_xformers.errors import UsageError, UserError
from timm_xformers.explaining.maps import (
    Query,
    attention_map,
    has_class_token,
    token_layout,
)
from timm_xformers.files.figures import literal, new_figure, ring, save
from timm_xformers.predicting.predict import Guess, Looker
from timm_xformers.replace.sites import attention_sites

__all__ = ["Seen", "draw_maps", "look"]

SIDE_INCHES = 1.9
PALE = 0.35  # of the image below a map


@dataclass(frozen=True)
class Seen:
    """What one model saw of an image.

    Attributes:
        name: Of the model.
        pixels: The image as it came to the model, uint8 (C, H, W).
        guess: Its likeliest class.
        query: Whose output the maps are of.
        maps: Weights by block, mean over the heads, (rows, columns) of the token grid.
        outside: Sum of the weights of tokens outside of the grid, by block.
    """

    name: str
    pixels: Tensor
    guess: Guess
    query: Query
    maps: dict[int, Tensor]
    outside: dict[int, float]


def look(
    name: str, image: str, blocks: Sequence[int] | None = None, query: Query | None = None
) -> Seen:
    """Run a model on an image, prepared as its weights expect it.

    Args:
        name: A name that timm has weights for, or a run folder.
        image: A file or an address.
        blocks: Numbers of the blocks to map; None: all.
        query: See `attention_map`; None: the class token, or the mean of all where there is none.

    Raises:
        UserError: There is no such model, image, block or query, or the block has no map.
    """
    looker = Looker(name)
    model = looker.model
    try:
        pixels = looker.read(image)
    except UserError as error:
        raise UserError(f"Cannot read an image: {image} {error}.") from error
    images = looker.scale([pixels])
    if query is None:
        query = "class" if has_class_token(model) else "mean"
    maps: dict[int, Tensor] = {}
    outside: dict[int, float] = {}
    try:
        # Block 0 of a model without attention says so.
        for block in blocks or range(max(1, len(attention_sites(model)))):
            weights = attention_map(model, images, block, query)[0].mean(dim=0).cpu()  # (N,)
            before, grid = token_layout(model, looker.expects.shape[1:], len(weights))
            maps[block] = weights[before:].reshape(grid)
            outside[block] = float(weights[:before].sum())
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    ((guess,),) = looker.guess(images, 1)
    return Seen(name, pixels, guess, query, maps, outside)


def draw_maps(path: Path, seen: Sequence[Seen]) -> None:
    """Draw what models saw of one image in the same blocks, a row each.

    Maps of a block have one scale in all rows. White is no weight, red is weight, blue is negative
    weight. The suffix gives the format.

    Raises:
        UserError: The format is unknown.
    """
    blocks = list(seen[0].maps)
    figure = new_figure(SIDE_INCHES * (len(blocks) + 1), (SIDE_INCHES + 0.55) * len(seen) + 0.3)
    places = figure.subplots(len(seen), len(blocks) + 1, squeeze=False)
    for row, axes in zip(seen, places, strict=True):
        _draw_image(axes[0], row.pixels, 1.0)
        share = f"{100 * row.guess.probability:.1f} %"
        label = literal(row.guess.name.partition(",")[0], 18)
        axes[0].set_title(f"{literal(row.name, 12, 14)}\n{label}: {share}", fontsize=8)
        for block, panel in zip(blocks, axes[1:], strict=True):
            highest = max(float(other.maps[block].abs().max()) for other in seen)
            _draw_map(panel, row, block, highest)
    words = {"class": "the class token", "mean": "all tokens, on average"}
    query = seen[0].query
    whose = words.get(query) if isinstance(query, str) else f"token {query}, ringed"
    figure.suptitle(f"Weights in the output of {whose}; mean over heads", fontsize=9)
    save(figure, path)


def _draw_image(axes: Any, pixels: Tensor, strength: float) -> None:
    _, rows, cols = pixels.shape
    picture = pixels.permute(1, 2, 0).numpy()
    if pixels.shape[0] == 1:
        picture = picture.repeat(3, axis=2)
    if strength < 1:  # grey and pale, so that all colour is the map's
        grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
        picture = (255 - strength * (255 - grey)).astype("uint8")
    axes.imshow(picture, extent=(0, cols, rows, 0), interpolation="nearest")
    axes.set_axis_off()


def _draw_map(axes: Any, row: Seen, block: int, highest: float) -> None:
    weights = row.maps[block]
    _, height, width = row.pixels.shape
    _draw_image(axes, row.pixels, PALE)
    axes.imshow(
        weights.numpy(),
        cmap="RdBu_r",
        vmin=-highest or -1.0,
        vmax=highest or 1.0,
        alpha=(weights.abs() / (highest or 1.0)).sqrt().clamp(0.0, 0.9).numpy(),
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    if isinstance(row.query, tuple):
        rows, cols = weights.shape
        ring(
            axes, (row.query[1] + 0.5) * width / cols, (row.query[0] + 0.5) * height / rows,
            color="black",
        )  # fmt: skip
    outside = row.outside[block]
    extra = f"\nprefix tokens {100 * outside:.0f} %" if outside else "\n"
    axes.set_title(f"block {block}, to {100 * float(weights.max()):.2g} %{extra}", fontsize=8)
