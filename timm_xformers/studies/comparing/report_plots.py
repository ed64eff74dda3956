"""Pictures of a comparison: accuracy against cost, and validation curves over each other.

A dashed line joins the groups that no other beats in both cost and mean accuracy, Pareto's front.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm_xformers.files.figures import (
    COLOURS,
    MARKERS,
    literal,
    new_figure,
    save,
    whole_numbers,
)
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.studies.comparing.groups import METRICS, Group, Metric

__all__ = ["Cost", "picture_titles", "plot_report"]

# Above this many, names beside the points would be too small; they go into a legend.
MOST_LABELS = 12
LEGEND_ROWS = 24
LINES = ("-", "--", "-.", ":")
# Place on the horizontal axis, mean accuracy there, and the accuracies of the runs.
Point = tuple[float, float, list[float]]


class Cost(NamedTuple):
    """What accuracy is drawn against: the picture's title, the axis, and a value for each group."""

    title: str
    label: str
    values: Sequence[float | None]


class _Picture(NamedTuple):
    """What a file shows: points against a cost or curves, of the groups (by number) with any."""

    title: str
    x_label: str
    y_label: str
    is_curve: bool
    points: dict[int, list[Point]]


def plot_report(
    output: Path, groups: Sequence[Group], metric: Metric, costs: Mapping[str, Cost]
) -> dict[str, str]:
    """Draw what there is to draw, one panel per data set, in the place of earlier pictures.

    Args:
        output: Folder for the files.
        groups: Rows of the report; their order decides the colours, so that one looks the same in
            every picture.
        metric: Whose accuracy.
        costs: By name of the file.

    Returns:
        Titles of the files written, by name.
    """
    for file in (*costs, *CURVES):
        (output / file).unlink(missing_ok=True)
    pictures = _pictures(groups, metric, costs)
    for file, picture in pictures.items():
        _draw(output / file, groups, picture)
    return {file: picture.title for file, picture in pictures.items()}


def picture_titles(
    groups: Sequence[Group], metric: Metric, costs: Mapping[str, Cost]
) -> dict[str, str]:
    """What `plot_report` would return."""
    return {file: found.title for file, found in _pictures(groups, metric, costs).items()}


def _pictures(
    groups: Sequence[Group], metric: Metric, costs: Mapping[str, Cost]
) -> dict[str, _Picture]:
    found = {}
    words = " or ".join(dict.fromkeys(group.record.headline.word for group in groups))
    y_label = f"{METRICS[metric].capitalize()} {words} (%): mean, and small the runs"
    for file, (title, label, values) in costs.items():
        points: dict[int, list[Point]] = {}
        for number, (group, value) in enumerate(zip(groups, values, strict=True)):
            score, key = group.score(metric), group.record.headline.key
            if value and score:
                points[number] = [(value, score.mean, group.values(f"{metric}_{key}_percent"))]
        found[file] = _Picture(title, label, y_label, False, points)
    y_label = f"Validation {words} (%); band: lowest to highest seed"
    for file, (title, label, places) in CURVES.items():
        curves = {number: _curve(group, places) for number, group in enumerate(groups)}
        # Runs of one epoch have a point each and no curve.
        is_curve = any(len(curve) > 1 for curve in curves.values())
        points = {number: curve for number, curve in curves.items() if curve and is_curve}
        found[file] = _Picture(title, label, y_label, True, points)
    return {file: picture for file, picture in found.items() if picture.points}


def _draw(path: Path, groups: Sequence[Group], picture: _Picture) -> None:
    """One panel per data set."""
    from matplotlib.ticker import LogLocator, NullFormatter

    # The end of a long name is a setting or a folder and tells it from others.
    names = {number: literal(groups[number].label, 20, 40) for number in picture.points}
    members: dict[str, list[int]] = {}
    for number in picture.points:
        members.setdefault(groups[number].record.data, []).append(number)
    # Names stand at the right; a letter of 8 points is about 0.075 inches wide.
    longest, most = max(map(len, names.values())), max(map(len, members.values()))
    columns = math.ceil(most / LEGEND_ROWS) if most > MOST_LABELS else 1
    figure = new_figure(7 + columns * (0.3 + 0.075 * longest), 4.8 * len(members))
    panels = figure.subplots(len(members), 1, squeeze=False)[:, 0]
    for axes, (data, numbers) in zip(panels, members.items(), strict=True):
        places = {n: _plot(axes, picture, n, names[n]) for n in numbers}
        axes.set_title(data)
        axes.set_xlabel(picture.x_label)
        axes.set_ylabel(picture.y_label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.06)
        if not picture.is_curve and len(places) > 1:
            x, y = zip(*_front(list(places.values())), strict=True)
            axes.plot(x, y, color="0.5", linestyle="--", linewidth=0.8, zorder=1)
        low, high = min(x for x, _ in places.values()), max(x for x, _ in places.values())
        if picture.x_label == "Epoch":
            whole_numbers(axes)
        elif not picture.is_curve and high > 10 * low:
            axes.set_xscale("log")
            steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.12g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(numbers) > MOST_LABELS:
            place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
            axes.legend(**place, fontsize=6.5, ncols=columns, frameon=False)
        else:
            _name_points(axes, names, places)
    save(figure, path)


def _plot(axes: Any, picture: _Picture, number: int, name: str) -> tuple[float, float]:
    """Draw one group; gives the place that its name belongs to."""
    x, mean, runs = zip(*picture.points[number], strict=True)
    color, marker = _colour(number), MARKERS[number % len(MARKERS)]
    if picture.is_curve:
        line = LINES[number // len(COLOURS) % len(LINES)]
        alone = marker if len(x) == 1 else None
        axes.plot(x, mean, color=color, linestyle=line, marker=alone, label=name)
        low, high = [min(each) for each in runs], [max(each) for each in runs]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        style = {"marker": marker, "color": color, "linestyle": "none"}
        axes.plot(x, mean, label=name, **style)
        (top1,) = runs
        if len(top1) > 1:  # with two or three runs an interval is so wide that it hides the rest
            axes.plot(x * len(top1), top1, markersize=2.5, alpha=0.8, **style)
            axes.plot(x * 2, [min(top1), max(top1)], color=color, linewidth=0.8)
    return x[-1], mean[-1]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


# Where each row of a run stands on the horizontal axis; nothing if that is not known.
Places = Callable[[Sequence[EpochRow]], Sequence[float]]


def _processor_seconds(rows: Sequence[EpochRow]) -> Sequence[float]:
    seconds = [row.cpu_seconds for row in rows]
    return [] if None in seconds else list(itertools.accumulate(s or 0.0 for s in seconds))


# File -> title, label of the axis, places on it.
CURVES: dict[str, tuple[str, str, Places]] = {
    "validation_curves.png": (
        "Validation accuracy over the epochs",
        "Epoch",
        lambda rows: [row.epoch for row in rows],
    ),
    "validation_seconds.png": (
        "Validation accuracy over processor seconds of training",
        "Processor seconds of training",
        _processor_seconds,
    ),
}


def _curve(group: Group, places: Places) -> list[Point]:
    """Validation accuracy by epoch, over the runs that know it and their places.

    The place is the mean over the runs, so that epochs stay together.
    """
    values: dict[int, list[tuple[float, float]]] = {}
    for run in group.runs:
        for row, place in zip(run.rows, places(run.rows), strict=False):
            if (percent := group.record.headline.of(row, "val")) is not None:
                values.setdefault(row.epoch, []).append((place, percent))
    found: list[Point] = []
    for epoch in sorted(values):
        where, top1 = zip(*values[epoch], strict=True)
        found.append((statistics.fmean(where), statistics.fmean(top1), [*top1]))
    return found


def _front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places that none beats in both directions, from the cheapest up."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _name_points(
    axes: Any, names: Mapping[int, str], places: Mapping[int, tuple[float, float]]
) -> None:
    """Names in a column beside the panel, in the points' order, so that none covers another."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # as it is now: names are placed by it
    gap = 0.055  # of the panel's height, for 8 points of text
    order = sorted(places, key=lambda number: (places[number][1], -number))
    heights = [(places[number][1] - low) / (high - low) for number in order]
    for turn in range(1, len(heights)):  # up from the lowest
        heights[turn] = max(heights[turn], heights[turn - 1] + gap)
    ceiling = 1.0
    for turn in reversed(range(len(heights))):  # and down again from the top
        heights[turn] = min(heights[turn], ceiling)
        ceiling = heights[turn] - gap
    line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6}
    line |= {"shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
    for number, height in zip(order, heights, strict=True):
        axes.annotate(
            names[number],
            xy=places[number],
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=_colour(number),
            annotation_clip=False,
            arrowprops=line | {"color": _colour(number)},
        )
