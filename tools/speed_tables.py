"""Tables of docs/speed.md, from the files that `tools.speed_page` leaves in docs/speed/PART."""

import csv
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.compare import Summary, crossover, growth, is_void
from timm_xformers.benchmarking.settings import UNFUSED
from timm_xformers.files.tables import column_table, markdown_table

__all__ = [
    "CSV_FILE",
    "ORIGIN_FILE",
    "Part",
    "growth_table",
    "layers_table",
    "losses_table",
    "models_table",
    "origin_list",
    "package_list",
    "read_part",
    "short_table",
    "summary",
]

Line = Mapping[str, Any]
CSV_FILE, ORIGIN_FILE = "benchmark.csv", "origin.json"
# Passes of a cell, before and behind the stroke.
PASSES = ("forward", "backward")
FROM = 1024


@dataclass(frozen=True)
class Part:
    """What was measured for a part of the page; empty: nothing yet.

    Attributes:
        lines: Those of benchmark.csv by the main clock.
        origins: Settings, machine, versions, time and what was left out, of each benchmark.
    """

    lines: list[Line]
    origins: list[dict[str, Any]]

    def __add__(self, other: "Part") -> "Part":
        return Part(self.lines + other.lines, self.origins + other.origins)


def read_part(folder: Path) -> Part:
    """Read a folder that need not be there."""
    if not (folder / CSV_FILE).is_file():
        return Part([], [])
    with (folder / CSV_FILE).open(encoding="utf-8", newline="") as file:
        lines = _by_main_clock(list(csv.DictReader(file)))
    return Part(lines, json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8")))


def summary(lines: Sequence[Line], baseline: str) -> str:
    """What our layers gain over exact attention and over other packages.

    Every figure is the smaller one of the allocators that were measured. Void points are left out.

    Args:
        lines: Those of benchmark.csv.
        baseline: Label of exact attention.

    Returns:
        Markdown; empty if nothing was measured at `FROM` tokens or more.
    """
    main = [line for line in _by_main_clock(lines) if line["kind"] == "layer"]
    steady = [line for line in main if not _void(line)]
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
        last = [line for line in main if int(line["tokens"]) == sizes[-1]]
        cells.append(_peak([line for line in last if line["contender"] == name]))
        rows.append(cells)
    return "\n".join(markdown_table(heads, rows, "lr")) + "\n"


def layers_table(part: Part) -> list[str]:
    """Every point by allocator: speed-up over exact attention and over the fastest package."""
    places: dict[tuple[str, ...], list[Line]] = {}
    for line in part.lines:
        if not line["package"]:
            place = tuple(str(line[name]) for name in ("shape", "batch_size", "tokens", "name"))
            places.setdefault(place, []).append(line)
    exact = {origin["baseline"] for origin in part.origins}
    columns: dict[str, Any] = {
        "layer": lambda row: f"`{row[0]['name']}`",
        "shape": lambda row: row[0]["shape"],
        "batch": lambda row: row[0]["batch_size"],
        "tokens": lambda row: f"{int(row[0]['tokens']):,}",
    }
    for column, words in (("vs_exact", "exact"), ("vs_peer", "other package")):
        for allocator in dict.fromkeys(line["allocator"] for line in part.lines):
            columns[f"× {words}, {allocator}"] = functools.partial(
                _cell, column=column, allocator=allocator, exact=exact
            )
    columns["other package"] = lambda row: ", ".join(
        dict.fromkeys(line["peer"].partition(":")[0] for line in row if line["peer"])
    )
    return column_table(columns, list(places.values()), "llrr")


def short_table(part: Part) -> list[str]:
    """Speed-up over exact attention, a column for each number of tokens."""
    names = dict.fromkeys(line["name"] for line in part.lines if not line["package"])
    rows = [[line for line in part.lines if line["contender"] == name] for name in names]
    exact = {origin["baseline"] for origin in part.origins}
    columns: dict[str, Any] = {"layer": lambda row: f"`{row[0]['name']}`"}
    for size in sorted({int(line["tokens"]) for line in part.lines}):
        columns[f"{size:,} tokens"] = functools.partial(
            _cell, column="vs_exact", tokens=size, exact=exact
        )
    return column_table(columns, rows, "lr")


def models_table(part: Part) -> list[str]:
    """A training step of every model, other packages' included."""
    labels = dict.fromkeys(line["contender"] for line in part.lines)
    rows = [[line for line in part.lines if line["contender"] == label] for label in labels]
    columns: dict[str, Any] = {"model": lambda row: f"`{row[0]['contender']}`"}
    heads = {"per_second": "images/s", "vs_exact": "× exact", "vs_peer": "× other package"}
    for column, words in heads.items():
        for allocator in dict.fromkeys(line["allocator"] for line in part.lines):
            columns[f"{words}, {allocator}"] = functools.partial(
                _cell, column=column, allocator=allocator, tasks=("train",)
            )
    columns["MiB"] = _peak
    return column_table(columns, rows, "lr")


def growth_table(part: Part) -> list[str]:
    """Exponents of time and memory, and what there is at the greatest length."""
    names = dict.fromkeys(line["contender"] for line in part.lines)
    rows = [[line for line in part.lines if line["contender"] == name] for name in names]
    last = max(int(line["tokens"]) for line in part.lines)
    exact = {origin["baseline"] for origin in part.origins}
    columns: dict[str, Any] = {
        "layer": lambda row: f"`{row[0]['contender']}`",
        "e of time": lambda row: _both(_exponent(row, "ms", task) for task in PASSES),
        "e of memory": lambda row: _exponent(row, "peak_mib", "backward"),
        f"× exact at {last:,}": functools.partial(
            _cell, column="vs_exact", tokens=last, exact=exact
        ),
        f"MiB at {last:,}": lambda row: _peak(
            [line for line in row if int(line["tokens"]) == last]
        ),
    }
    return column_table(columns, rows, "lr")


def losses_table(parts: Iterable[Part]) -> list[str]:
    """Every point at which a layer or model of ours is slower, void ones too."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for line in (line for part in parts for line in part.lines):
        if line["package"] or line["name"] == UNFUSED:
            continue
        where = line["shape"] or "model"
        for column, rival in (
            ("vs_exact", "exact attention"),
            ("vs_peer", line["peer"].partition(":")[0]),
        ):
            if line[column] in ("", None) or float(line[column]) >= 1:
                continue
            key = (line["name"], rival, f"{where}, batch {line['batch_size']}")
            task = "forward" if line["pass"] == "forward" else "with backward"
            cell = f"{int(line['tokens']):,}: {_ratio(line, column)}"
            found.setdefault(key, {}).setdefault(f"{task}, {line['allocator']}", []).append(cell)
    if not found:
        return ["None."]
    columns: dict[str, Any] = {
        "layer": lambda row: f"`{row[0][0]}`",
        "slower than": lambda row: row[0][1],
        "where": lambda row: row[0][2],
    }
    for task in ("forward", "with backward"):
        for allocator in ("default", "tuned"):
            head = f"{task}, {allocator}"
            columns[head] = lambda row, head=head: ", ".join(row[1].get(head, []))
    return column_table(columns, list(found.items()), "l")


def origin_list(parts: Mapping[str, Part]) -> list[str]:
    """Bullets: the machine, day, commit and versions of every part; alike ones together."""
    names: dict[str, dict[str, None]] = {}
    versions: dict[str, dict[str, None]] = {}
    for name, part in parts.items():
        for origin in part.origins:
            hardware, known = origin["hardware"], origin["versions"]
            words = (
                f"{hardware['cpu']} ({hardware['vectors']}, {hardware['cores']} cores), "
                f"{origin['created'][:10]}, commit {str(origin['commit'])[:7]}, "
                f"torch {known['torch']}"
            )
            names.setdefault(words, {})[name] = None
            others = (f"{key} {value}" for key, value in known.items() if key != "torch")
            versions.setdefault(words, {}).update(dict.fromkeys(others))
    return [
        f"- *{', '.join(names[words])}*: {words}, {', '.join(versions[words])}." for words in names
    ]


def package_list(parts: Iterable[Part]) -> list[str]:
    """Bullets: what the other packages compute, and what of them was left out and why."""
    parts = list(parts)
    measured = {line["package"] for part in parts for line in part.lines}
    same: dict[str, str] = {}
    missing: dict[str, None] = {}
    left_out: dict[tuple[str, str], set[int]] = {}
    for origin in (origin for part in parts for origin in part.origins):
        same |= {name: words for name, words in origin["peers"].items() if name in measured}
        for label, reasons in origin["left_out"].items():
            for reason, sizes in reasons.items():
                if reason.startswith("not installed"):
                    missing[label.partition(":")[0]] = None
                else:
                    left_out.setdefault((label, reason), set()).update(sizes)
    lines = [f"- **{name}**: {words}." for name, words in same.items()]
    for (label, reason), sizes in left_out.items():
        at = ", ".join(f"{size:,}" for size in sorted(sizes))
        lines.append(f"- Left out: {label} at {at} tokens: {reason}.")
    if missing:
        lines.append(f"- Not installed for some parts: {', '.join(missing)}.")
    return lines


def _cell(
    row: Sequence[Line],
    *,
    column: str,
    allocator: str | None = None,
    tokens: int | None = None,
    tasks: Sequence[str] = PASSES,
    exact: Iterable[str] = (),
) -> str:
    """One figure of every pass; milliseconds in place of exact attention's 1."""
    chosen = [
        line
        for line in row
        if allocator in (None, line["allocator"]) and tokens in (None, int(line["tokens"]))
    ]
    milliseconds = column == "vs_exact" and row[0]["contender"] in exact
    words = []
    for task in tasks:
        found = [line for line in chosen if line["pass"] == task]
        words.append(_ratio(found[0], "ms" if milliseconds else column) if found else "")
    return _both(words) + (" ms" if milliseconds and any(words) else "")


def _ratio(line: Line, column: str) -> str:
    """A figure, with a star where the baseline was not steady."""
    if line[column] in ("", None):
        return ""
    value = float(line[column])
    if column in ("ms", "per_second"):
        text = f"{value:,.{0 if value >= 100 else 1}f}"
    else:
        text = f"{value:.3f}" if 0.995 <= value < 1 else f"{value:.2f}"  # never a loss as 1.00
    return f"{text}*" if _void(line) else text


def _exponent(row: Sequence[Line], column: str, task: str) -> str:
    costs = {}
    for line in row:
        if line["pass"] != task or line[column] in ("", None):
            continue
        median, q1, q3 = (float(line[f"ms{end}"]) for end in ("", "_q1", "_q3"))
        times = Summary(median, q1, q3, int(line["rounds"]))
        if column != "ms" or not is_void(times):
            costs[int(line["tokens"])] = float(line[column])
    slope = growth(costs)
    return "not steady" if slope is None else f"{slope:.2f}"


def _peak(row: Sequence[Line]) -> str:
    """Highest memory over allocators."""
    peaks = [float(line["peak_mib"]) for line in row if line["peak_mib"] not in ("", None)]
    return f"{max(peaks):,.0f}" if peaks else ""


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


def _void(line: Line) -> bool:
    return str(line["void"]) == "True"


def _by_main_clock(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line["clock"] == _clock(line)]


def _clock(line: Line) -> str:
    if line["device"] == "cuda":
        return "gpu"
    return "cpu" if int(line["threads"]) == 1 else "wall"
