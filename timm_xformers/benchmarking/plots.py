"""time.png and memory.png: cost against tokens, where exact attention is overtaken marked."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.compare import Row, crossover
from timm_xformers.benchmarking.settings import UNFUSED, Contender, Point
from timm_xformers.benchmarking.tables import groups_of, start_of, title_of
from timm_xformers.files.figures import COLOURS, MARKERS, new_figure, ring, save

__all__ = ["plot_benchmark"]


def plot_benchmark(output: Path, rows: Sequence[Row], baseline: Contender) -> list[str]:
    """Draw time and memory, one picture per precision, threads and allocator, a panel per pass.

    Returns:
        Names of the files written.
    """
    pictures: dict[tuple[str, ...], dict[Point, list[Row]]] = {}
    for point, members in groups_of(rows).items():
        setting: tuple[str, ...] = (point.dtype, f"{point.threads}threads", point.allocator)
        pictures.setdefault(setting, {})[point] = members
    styles = _styles(rows, baseline)
    written = []
    for setting, panels in pictures.items():
        suffix = "" if len(pictures) == 1 else "-" + "-".join(setting)
        _draw(output / f"time{suffix}.png", panels, styles, memory=False)
        written.append(f"time{suffix}.png")
        known = {
            point: [row for row in members if row.peak_mib is not None]
            for point, members in panels.items()
        }
        if any(known.values()):
            some = {point: members for point, members in known.items() if members}
            _draw(output / f"memory{suffix}.png", some, styles, memory=True)
            written.append(f"memory{suffix}.png")
    return written


def _styles(rows: Sequence[Row], baseline: Contender) -> dict[str, dict[str, Any]]:
    """A colour per mechanism; dashes for other packages, dots if compiled, long dashes if fused."""
    plain = {baseline.name: "black", UNFUSED: "0.5"}
    names = dict.fromkeys(r.contender.kind for r in rows if r.contender.kind not in plain)
    places = {name: place for place, name in enumerate(names)}
    styles: dict[str, dict[str, Any]] = {}
    packages: dict[str, list[str]] = {}
    for contender in dict.fromkeys(row.contender for row in rows):
        place = places.get(contender.kind)
        others = packages.setdefault(contender.name, [])
        if contender.peer and contender.peer not in others:
            others.append(contender.peer)
        lines = ("-", "--", "-.")
        line = lines[min(others.index(contender.peer) + 1, 2)] if contender.peer else "-"
        styles[contender.label] = {
            "color": plain.get(contender.kind, COLOURS[(place or 0) % len(COLOURS)]),
            "marker": "." if place is None else MARKERS[place % len(MARKERS)],
            "linestyle": {"compiled": ":", "fused": (0, (5, 1))}.get(contender.mode, line),
            "linewidth": 2.2 if contender.label == baseline.label else 1.3,
            "markersize": 4,
            "alpha": 0.75 if contender.peer else 1.0,
        }
    return styles


def _draw(
    path: Path,
    panels: dict[Point, list[Row]],
    styles: dict[str, dict[str, Any]],
    *,
    memory: bool,
) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = new_figure(7.2 * len(panels) + 1, 7.4)
    for axes, (point, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label in dict.fromkeys(row.contender.label for row in rows):
            mine = sorted(
                (row for row in rows if row.contender.label == label), key=lambda row: row.size
            )
            _line(axes, rows, mine, styles[label], memory=memory)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({row.size for row in rows})
        axes.set_xticks(
            sizes, [f"{size:,}" for size in sizes], rotation=45 if len(sizes) > 6 else 0
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Tokens")
        axes.set_ylabel("Peak memory of a step (MiB)" if memory else "Milliseconds")
        axes.set_title(_wrap(title_of(point)), fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    if not memory:
        note = "Rings: as fast as the baseline from there on. Hollow: void, baseline not steady."
        figure.text(0.5, -0.01, note, ha="center", va="top", fontsize=8)
    save(figure, path, bbox_inches="tight")


def _line(
    axes: Any, rows: Sequence[Row], mine: Sequence[Row], style: dict[str, Any], *, memory: bool
) -> None:
    label = mine[0].contender.label
    sizes = [row.size for row in mine]
    if memory:
        # A pass may take nothing that the process did not hold already; logs need more than 0.
        axes.plot(sizes, [max(row.peak_mib or 0.0, 0.1) for row in mine], label=label, **style)
        return
    times = [1e3 * row.seconds.median for row in mine]
    start = start_of(rows, label)
    is_exact = all(row.vs_exact.q1 == row.vs_exact.q3 == 1 for row in mine)
    name = label if is_exact else f"{label} ({'never' if start == '-' else f'from {start}'})"
    axes.plot(sizes, times, label=name, **style)
    void = [(row.size, time) for row, time in zip(mine, times, strict=True) if row.void]
    if void:
        hollow = style | {"linestyle": "none", "markerfacecolor": "white", "markersize": 7}
        axes.plot(*zip(*void, strict=True), **hollow)
    place = crossover({row.size: row.vs_exact.median for row in mine if not row.void})
    if place is not None and not is_exact:
        import numpy as np

        # On a line that is straight on log axes.
        height = float(np.exp(np.interp(np.log(place), np.log(sizes), np.log(times))))
        ring(axes, place, height, markersize=11, markeredgewidth=1.5, color=style["color"])


def _wrap(title: str) -> str:
    return re.sub(r"(.{30,}?), ", r"\1,\n", title)
