"""A sheet of pictures with what they were taken for."""

import math
from collections.abc import Sequence
from pathlib import Path

from timm_xformers.files.figures import literal, new_figure, save
from timm_xformers.predicting.images import open_image
from timm_xformers.predicting.predict import Prediction

__all__ = ["MOST_PICTURES", "draw_grid"]

MOST_PICTURES = 64
COLUMNS = 8
SIDE_INCHES = 1.9
LINES = 2  # guesses below each picture
SMALL_PIXELS = 96  # below, every pixel is shown as a square


def draw_grid(path: Path, predictions: Sequence[Prediction]) -> None:
    """Draw up to `MOST_PICTURES` pictures with their likeliest classes; the suffix is the format.

    Raises:
        UserError: The format is unknown.
    """
    shown = predictions[:MOST_PICTURES]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(SIDE_INCHES * columns, (SIDE_INCHES + 0.5) * rows)
    for place, prediction in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        picture = open_image(prediction.image, "RGB")
        smooth = "nearest" if max(picture.size) < SMALL_PIXELS else "antialiased"
        axes.imshow(picture, interpolation=smooth)
        axes.set_axis_off()
        lines = [
            f"{literal(guess.name.partition(',')[0], 20)}: {100 * guess.probability:.1f} %"
            for guess in prediction.classes[:LINES]
        ]
        axes.set_title("\n".join(lines), fontsize=8)
    save(figure, path)
