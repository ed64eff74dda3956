"""Pictures of a comparison: accuracy against cost, and validation curves over each other.

A dashed line joins the groups that no other beats in both cost and mean accuracy, Pareto's front.
"""

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_xformers.files.figures import (
    COLOURS,
    MARKERS,
    literal,
    new_figure,
    save,
    whole_numbers,
)
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.studies.comparing.groups import Group, Metric

__all__ = ["PLOTS", "Cost", "picture_names", "plot_report"]

# File -> what it shows.
PLOTS = {
    "accuracy_seconds.png": "Accuracy against seconds of training",
    "accuracy_params.png": "Accuracy against parameters",
    "accuracy_memory.png": "Accuracy against peak memory",
    "validation_curves.png": "Validation accuracy over the epochs",
    "validation_seconds.png": "Validation accuracy over processor seconds of training",
}
# Label of an axis, and what of a group stands on it.
Cost = tuple[str, Callable[[Group], float | None]]
# Above this many, names beside the points would be too small; they go into a legend.
MOST_LABELS = 12
LEGEND_ROWS = 24
LINES = ("-", "--", "-.", ":")


# Draws one group in a style and returns the place that its name belongs to.
Draw = Callable[[Any, Group, dict[str, Any]], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    """What a file shows.

    Attributes:
        shown: Groups with something to show.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        draw: Draws one of them.
        against_cost: Points against a cost, not curves.
    """

    shown: list[Group]
    x_label: str
    y_label: str
    draw: Draw
    against_cost: bool


def plot_report(
    output: Path,
    groups: Sequence[Group],
    metric: Metric,
    costs: Mapping[str, Cost] | None = None,
) -> list[str]:
    """Draw what there is to draw, one panel per data set.

    Args:
        output: Folder for the files.
        groups: Rows of the report; their order decides the colours, so that one looks the same in
            every picture.
        metric: Whose accuracy.
        costs: By name of the file, what accuracy is drawn against; None: as in `PLOTS`.

    Returns:
        Names of the files written.
    """
    pictures = _pictures(groups, metric, costs)
    for file, picture in pictures.items():
        _draw(output / file, groups, picture)
    return list(pictures)


def picture_names(
    groups: Sequence[Group], metric: Metric, costs: Mapping[str, Cost] | None = None
) -> list[str]:
    """Names of the files that `plot_report` would write."""
    return list(_pictures(groups, metric, costs))


def _pictures(
    groups: Sequence[Group], metric: Metric, costs: Mapping[str, Cost] | None
) -> dict[str, _Picture]:
    found = {}
    y_label = f"{'Test' if metric == 'test' else 'Validation'} top-1 (%): mean, and small the runs"
    for file, (label, cost) in (COSTS if costs is None else costs).items():
        shown = [group for group in groups if cost(group) and group.top1(metric)]
        found[file] = _Picture(shown, label, y_label, _points(cost, metric), against_cost=True)
    y_label = "Validation top-1 (%); band: lowest to highest seed"
    for file, label, places in (
        ("validation_curves.png", "Epoch", _epochs),
        ("validation_seconds.png", "Processor seconds of training", _processor_seconds),
    ):
        shown = [group for group in groups if _curve(group, places)]
        found[file] = _Picture(shown, label, y_label, _lines(places), against_cost=False)
    return {file: picture for file, picture in found.items() if picture.shown}


def _draw(path: Path, groups: Sequence[Group], picture: _Picture) -> None:
    """One panel per data set."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = picture.shown
    sets = list(dict.fromkeys(group.record.data for group in shown))
    # Names stand at the right; a letter of 8 points is about 0.075 inches wide.
    longest = max(len(_short(group.label)) for group in shown)
    most = max(Counter(group.record.data for group in shown).values())
    columns = math.ceil(most / LEGEND_ROWS) if most > MOST_LABELS else 1
    figure = new_figure(7 + columns * (0.3 + 0.075 * longest), 4.8 * len(sets))
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, data in zip(panels, sets, strict=True):
        members = [group for group in shown if group.record.data == data]
        places = [picture.draw(axes, group, _style(groups.index(group))) for group in members]
        axes.set_title(data)
        axes.set_xlabel(picture.x_label)
        axes.set_ylabel(picture.y_label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.06)
        if picture.against_cost and len(places) > 1:
            x, y = zip(*_front(places), strict=True)
            axes.plot(x, y, color="0.5", linestyle="--", linewidth=0.8, zorder=1)
        low, high = min(x for x, _ in places), max(x for x, _ in places)
        if picture.x_label == "Epoch":
            whole_numbers(axes)
        elif picture.against_cost and high > 10 * low:
            axes.set_xscale("log")
            steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.12g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(members) > MOST_LABELS:
            place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
            axes.legend(**place, fontsize=6.5, ncols=columns, frameon=False)
        else:
            _name_points(axes, members, places, [_style(groups.index(g)) for g in members])
    save(figure, path)


def _points(cost: Callable[[Group], float | None], metric: Metric) -> Draw:
    def draw(axes: Any, group: Group, style: dict[str, Any]) -> tuple[float, float]:
        x, top1 = cost(group) or 0.0, group.top1(metric)
        assert top1 is not None
        marker = {"marker": style["marker"], "color": style["color"], "linestyle": "none"}
        axes.plot([x], [top1.mean], label=_short(group.label), **marker)
        runs = group.values(f"{metric}_top1_percent")
        if len(runs) > 1:  # with two or three runs an interval is so wide that it hides the rest
            axes.plot([x] * len(runs), runs, markersize=2.5, alpha=0.8, **marker)
            axes.plot([x, x], [min(runs), max(runs)], color=style["color"], linewidth=0.8)
        return x, top1.mean

    return draw


def _lines(places: "Places") -> Draw:
    def draw(axes: Any, group: Group, style: dict[str, Any]) -> tuple[float, float]:
        x, mean, low, high = zip(*_curve(group, places), strict=True)
        marker = style["marker"] if len(x) == 1 else None
        axes.plot(x, mean, **(style | {"marker": marker}), label=_short(group.label))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        return x[-1], mean[-1]

    return draw


# Where each row of a run stands on the horizontal axis; nothing if that is not known.
Places = Callable[[Sequence[EpochRow]], Sequence[float]]


def _epochs(rows: Sequence[EpochRow]) -> Sequence[float]:
    return [row.epoch for row in rows]


def _processor_seconds(rows: Sequence[EpochRow]) -> Sequence[float]:
    seconds = [row.cpu_seconds for row in rows]
    return [] if None in seconds else list(itertools.accumulate(s or 0.0 for s in seconds))


def _curve(group: Group, places: Places) -> list[tuple[float, float, float, float]]:
    """Place, mean, lowest and highest validation accuracy by epoch, over the runs that know them.

    The place is the mean over the runs, so that epochs stay together.
    """
    values: dict[int, list[tuple[float, float]]] = {}
    for run in group.runs:
        for row, place in zip(run.rows, places(run.rows), strict=False):
            if row.val_top1_percent is not None:
                values.setdefault(row.epoch, []).append((place, row.val_top1_percent))
    found = []
    for epoch in sorted(values):
        where, top1 = zip(*values[epoch], strict=True)
        found.append((statistics.fmean(where), statistics.fmean(top1), min(top1), max(top1)))
    return found


def _front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places that none beats in both directions, from the cheapest up."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _name_points(
    axes: Any,
    members: Sequence[Group],
    places: Sequence[tuple[float, float]],
    styles: Sequence[dict[str, Any]],
) -> None:
    """Names in a column beside the panel, in the points' order, so that none covers another."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # as it is now: names are placed by it
    gap = 0.055  # of the panel's height, for 8 points of text
    order = sorted(range(len(members)), key=lambda i: (places[i][1], -i))
    heights = [(places[i][1] - low) / (high - low) for i in order]
    for number in range(1, len(heights)):  # up from the lowest
        heights[number] = max(heights[number], heights[number - 1] + gap)
    ceiling = 1.0
    for number in reversed(range(len(heights))):  # and down again from the top
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - gap
    line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6}
    line |= {"shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
    for i, height in zip(order, heights, strict=True):
        axes.annotate(
            _short(members[i].label),
            xy=places[i],
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=styles[i]["color"],
            annotation_clip=False,
            arrowprops=line | {"color": styles[i]["color"]},
        )


def _seconds(group: Group) -> float | None:
    """Training time; an evaluation's seconds are something else."""
    return group.mean("seconds") if group.record.kind == "train" else None


COSTS: dict[str, Cost] = {
    "accuracy_seconds.png": ("Seconds of training", _seconds),
    "accuracy_params.png": ("Parameters", lambda group: group.record.params),
    "accuracy_memory.png": ("Peak memory (MiB)", lambda group: group.peak("peak_memory_mib")),
}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def _short(label: str) -> str:
    """The end of a long name is a setting or a folder and tells it from others."""
    return literal(label, 20, 40)
