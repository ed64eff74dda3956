"""Pictures of a comparison: accuracy against cost, and validation curves over each other."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
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
from timm_xformers.studies.comparing.groups import Group, Metric

__all__ = ["PLOTS", "plot_report"]

# File -> what it shows.
PLOTS = {
    "accuracy_seconds.png": "Accuracy against seconds of training",
    "accuracy_params.png": "Accuracy against parameters",
    "accuracy_memory.png": "Accuracy against peak memory",
    "validation_curves.png": "Validation accuracy over the epochs",
}
# Above this many, names beside the points would be too small; they go into a legend.
MOST_LABELS = 12
LEGEND_ROWS = 24
LINES = ("-", "--", "-.", ":")


def plot_report(output: Path, groups: Sequence[Group], metric: Metric) -> list[str]:
    """Draw what there is to draw, one panel per data set.

    Args:
        output: Folder for the files named in `PLOTS`.
        groups: Rows of the report; their order decides the colours.
        metric: Whose accuracy.

    Returns:
        Names of the files written.
    """
    name = "Test" if metric == "test" else "Validation"
    costs: dict[str, tuple[str, Callable[[Group], float | None]]] = {
        "accuracy_seconds.png": ("Seconds of training", _seconds),
        "accuracy_params.png": ("Parameters", lambda group: group.record.params),
        "accuracy_memory.png": ("Peak memory (MiB)", lambda group: group.peak("peak_memory_mib")),
    }
    written = []
    for file, (label, cost) in costs.items():
        shown = [group for group in groups if cost(group) and group.top1(metric)]
        if shown:
            y_label = f"{name} top-1 (%): mean, and small the runs"
            _draw(output / file, groups, shown, label, y_label, _points(cost, metric))
            written.append(file)
    shown = [group for group in groups if _curve(group)]
    if shown:
        label = "Validation top-1 (%); band: lowest to highest seed"
        _draw(output / "validation_curves.png", groups, shown, "Epoch", label, _lines)
        written.append("validation_curves.png")
    return written


def _draw(
    path: Path,
    groups: Sequence[Group],
    shown: Sequence[Group],
    x_label: str,
    y_label: str,
    draw: Callable[[Any, Group, dict[str, Any]], tuple[float, float]],
) -> None:
    """One panel per data set.

    Args:
        path: The image to write.
        groups: All rows of the report, so that one looks the same in every picture.
        shown: Those with something to show.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        draw: Draws one group in a style and returns the place that its name belongs to.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    sets = list(dict.fromkeys(group.record.data for group in shown))
    # Names stand at the right; a letter of 8 points is about 0.075 inches wide.
    longest = max(len(_short(group.label)) for group in shown)
    most = max(Counter(group.record.data for group in shown).values())
    columns = math.ceil(most / LEGEND_ROWS) if most > MOST_LABELS else 1
    figure = new_figure(7 + columns * (0.3 + 0.075 * longest), 4.8 * len(sets))
    panels = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axes, data in zip(panels, sets, strict=True):
        members = [group for group in shown if group.record.data == data]
        places = [draw(axes, group, _style(groups.index(group))) for group in members]
        axes.set_title(data)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.06)
        low, high = min(x for x, _ in places), max(x for x, _ in places)
        if draw is _lines:
            whole_numbers(axes)
        elif high > 10 * low:
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


def _points(
    cost: Callable[[Group], float | None], metric: Metric
) -> Callable[[Any, Group, dict[str, Any]], tuple[float, float]]:
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


def _lines(axes: Any, group: Group, style: dict[str, Any]) -> tuple[float, float]:
    epochs, mean, low, high = zip(*_curve(group), strict=True)
    marker = style["marker"] if len(epochs) == 1 else None
    axes.plot(epochs, mean, **(style | {"marker": marker}), label=_short(group.label))
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return epochs[-1], mean[-1]


def _curve(group: Group) -> list[tuple[int, float, float, float]]:
    """Epoch, mean, lowest and highest validation accuracy over the runs that know them."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for row in run.rows:
            if row.val_top1_percent is not None:
                values.setdefault(row.epoch, []).append(row.val_top1_percent)
    return [
        (epoch, statistics.fmean(values[epoch]), min(values[epoch]), max(values[epoch]))
        for epoch in sorted(values)
    ]


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


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def _short(label: str) -> str:
    """The end of a long name is a setting or a folder and tells it from others."""
    return literal(label, 20, 40)
