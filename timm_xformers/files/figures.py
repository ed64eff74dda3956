"""Figures: opened without a display, in colours that everybody tells apart, saved whole."""

import re
from pathlib import Path
from typing import Any

from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_file
from timm_xformers.files.text import plain

__all__ = [
    "BLUE",
    "COLOURS",
    "MARKERS",
    "VERMILION",
    "literal",
    "new_figure",
    "ring",
    "save",
    "whole_numbers",
]

# Okabe and Ito's colours without yellow, which is too pale for lines, and two of Paul Tol's: apart
# for every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
BLUE, VERMILION = COLOURS[:2]
MARKERS = "osD^vP*X<>"


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, for files only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure in the format of the file's suffix, at 120 dots per inch.

    Raises:
        UserError: The format is unknown.
    """
    suffix = path.suffix.removeprefix(".").lower()
    known = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in known:
        raise UserError(
            f"{path} has no format that can be drawn; end it in one of {', '.join(known)}."
        )
    with write_file(path) as fresh:
        figure.savefig(fresh, dpi=120, format=suffix, **options)


def ring(axes: Any, x: float, y: float, **style: Any) -> None:
    """Mark a place by a ring, which leaves the point inside visible."""
    given = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot([x], [y], **(given | style))


def whole_numbers(axes: Any) -> None:
    """Ticks of the horizontal axis at whole numbers, such as epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def literal(text: str, head: int = 60, tail: int = 0) -> str:
    """Text as it is, on one line: a dollar sign would begin a formula.

    Of folders, which pictures would carry to other people, the last name stays. Beyond head + tail
    letters the middle is cut.
    """
    text = re.sub(r"\blocal-dir:\S*[/\\](?=[^/\\\s])", "local-dir:", plain(text))
    if len(text) > head + tail:
        text = f"{text[:head]}…{text[len(text) - tail :]}"
    return text.replace("$", r"\$")
