"""A benchmark of layers in one table, as our pages show it, from its benchmark.csv.

    python -m tools.benchmark_summary docs/speed/readme

writes summary.md beside benchmark.csv.
"""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.compare import crossover
from timm_xformers.benchmarking.settings import BASELINE
from timm_xformers.files.atomic import write_text
from timm_xformers.files.tables import markdown_table

__all__ = ["summary", "write_summary"]

Line = Mapping[str, Any]
# Passes of a cell, before and behind the stroke.
PASSES = ("forward", "backward")
FROM = 1024


def write_summary(folder: Path) -> Path:
    """Write summary.md from benchmark.csv of the same folder."""
    with (folder / "benchmark.csv").open(encoding="utf-8", newline="") as file:
        table = summary(list(csv.DictReader(file)), BASELINE)
    write_text(folder / "summary.md", table)
    return folder / "summary.md"


def summary(lines: Sequence[Line], baseline: str) -> str:
    """What our layers gain over exact attention and over other packages.

    Every figure is the smaller one of the allocators that were measured. Void points are left out.

    Args:
        lines: Those of benchmark.csv.
        baseline: Label of exact attention.

    Returns:
        Markdown; empty if nothing was measured at `FROM` tokens or more.
    """
    main = [line for line in lines if line["clock"] == _clock(line) and line["kind"] == "layer"]
    steady = [line for line in main if str(line["void"]) != "True"]
    sizes = [n for n in sorted({int(line["tokens"]) for line in main}) if n >= FROM]
    names = dict.fromkeys(line["name"] for line in main if not line["package"])
    if not sizes:
        return ""
    heads = [f"× exact at {n:,}" for n in sizes] + [f"× other packages at {n:,}" for n in sizes]
    heads = ["layer", "as fast as exact from", *heads, f"MiB at {sizes[-1]:,}"]
    rows = []
    for name in names:
        own = [line for line in steady if line["contender"] == name]
        cells = [f"`{name}`"]
        if name == baseline:
            cells += ["", *(_milliseconds(own, n) for n in sizes), *[""] * len(sizes)]
        else:
            cells.append(_both(_start(own, task) for task in PASSES))
            for column in ("vs_exact", "vs_peer"):
                cells += [_both(_least(own, task, n, column) for task in PASSES) for n in sizes]
        peaks = [
            float(line["peak_mib"])
            for line in main
            if line["contender"] == name and int(line["tokens"]) == sizes[-1]
            if line["peak_mib"] not in ("", None)
        ]
        rows.append([*cells, f"{max(peaks):,.0f}" if peaks else ""])
    return "\n".join(markdown_table(heads, rows, "lr")) + "\n"


def _start(own: Sequence[Line], task: str) -> str:
    """Tokens from which a layer is as fast as exact attention, under the later allocator."""
    starts: list[str] = []
    values: list[float] = []
    for allocator in dict.fromkeys(line["allocator"] for line in own):
        faster = {
            int(line["tokens"]): float(line["vs_exact"])
            for line in own
            if (line["allocator"], line["pass"]) == (allocator, task)
        }
        start = crossover(faster)
        if faster and start is None:
            return "never"
        if start is not None:
            values.append(start)
            starts.append(f"≤ {start:.0f}" if start == min(faster) else f"{start:.0f}")
    return starts[values.index(max(values))] if values else ""


def _least(own: Sequence[Line], task: str, tokens: int, column: str) -> str:
    found = [
        float(line[column])
        for line in own
        if (line["pass"], int(line["tokens"])) == (task, tokens) and line[column] not in ("", None)
    ]
    return f"{min(found):.2f}" if found else ""


def _milliseconds(own: Sequence[Line], tokens: int) -> str:
    found = []
    for task in PASSES:
        times = [
            float(line["ms"])
            for line in own
            if (line["pass"], int(line["tokens"])) == (task, tokens)
        ]
        digits = 0 if times and min(times) >= 100 else 1
        found.append(f"{min(times):,.{digits}f}" if times else "")
    return f"{_both(found)} ms"


def _both(cells: Iterable[str]) -> str:
    """Forward, and with backward; nothing where neither is known."""
    words = list(cells)
    return " / ".join(word or "-" for word in words) if any(words) else ""


def _clock(line: Line) -> str:
    if line["device"] == "cuda":
        return "gpu"
    return "cpu" if int(line["threads"]) == 1 else "wall"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_summary(Path(argument)))
