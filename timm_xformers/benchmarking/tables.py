"""benchmark.csv, benchmark.md and, for models, timm.csv."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from timm_xformers.benchmarking.compare import (
    Row,
    Summary,
    crossover,
    growth,
    is_void,
    main_clock,
)
from timm_xformers.benchmarking.settings import Point
from timm_xformers.files.tables import csv_text, markdown_table

__all__ = ["groups_of", "lines_of", "markdown", "start_of", "timm_csv_text", "title_of"]

HOW = """\
Every round calls every contender in shuffled order, each for at least {min_ms:g} ms. Speed-ups \
are taken within a round; given are medians over rounds, quartiles in brackets. Clocks: processor \
time at one thread, wall clock at several, the device's own time on a GPU; benchmark.csv has wall \
clock for all.

Cells: speed-up over the baseline, `{baseline}`, whose row has milliseconds. *from*: tokens from \
which a contender is as fast as the baseline, between two lengths by interpolation. *growth*: e in \
time or memory ~ tokens^e, fitted from 1,024 tokens up, where the contender was itself steady. \
*× peer*: speed-up over the fastest other package's form, by length. *void*: the baseline's \
quartiles were further than 10 % from its median, so that none of it counts, measured again twice.
"""
MEMORY = """\
Peak memory of the steps, MiB over what was held before; the first 10 to 20 of a CPU are mostly \
library code that is used for the first time:
"""


def lines_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines of benchmark.csv: one per contender, point and clock."""
    return [_flat(row) for row in rows]


def timm_csv_text(rows: Sequence[Row]) -> str:
    """Models in the columns of timm's result files, so that both can be joined by ``model``."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    figures = ("samples_per_sec", "step_time", "batch_size", "img_size")
    empty = {f"{prefix}_{name}": "" for prefix in ("infer", "train") for name in figures}
    for row in rows:
        point = row.point
        if row.clock != "wall" or row.void or point.task not in ("forward", "train"):
            continue
        where = {name: getattr(point, name) for name in ("dtype", "device", "threads", "allocator")}
        params = {"param_count": round(row.params / 1e6, 2)}
        line = found.setdefault(
            (row.contender, point.size, *where.values()),
            {"model": row.contender.label, **empty, **params, **where},
        )
        values = (
            round(row.per_second, 2),
            round(1e3 * row.seconds.median, 3),
            point.batch_size,
            point.size or "",
        )
        prefix = "infer" if point.task == "forward" else "train"
        line |= {f"{prefix}_{name}": value for name, value in zip(figures, values, strict=True)}
    return csv_text(found.values())


def groups_of(rows: Sequence[Row]) -> dict[Point, list[Row]]:
    """Rows by the main clock, by what they share but length; the keys have size 0."""
    groups: dict[Point, list[Row]] = {}
    for row in rows:
        if row.clock == main_clock(row.point):
            groups.setdefault(dataclasses.replace(row.point, size=0), []).append(row)
    return groups


def start_of(rows: Sequence[Row], label: str) -> str:
    """From how many tokens on a contender is as fast as the baseline, in words."""
    mine = [row for row in rows if row.contender.label == label and not row.void]
    steady = {row.size: row.vs_exact.median for row in mine}
    start = crossover(steady)
    if start is None:
        return "-"
    return f"≤ {start:.0f}" if start == min(steady) else f"{start:.0f}"


def title_of(point: Point) -> str:
    """What a group shares."""
    what = f"layer {point.shape}" if point.kind == "layer" else "models"
    threads = "1 thread" if point.threads == 1 else f"{point.threads} threads"
    where = f"{threads}, {point.allocator} allocator" if point.device == "cpu" else "GPU"
    return f"{point.task}, {what}, batch {point.batch_size}, {point.dtype}, {where}"


def markdown(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The benchmark as text, from what benchmark.json holds and its rows."""
    baseline = result["baseline"]
    how = HOW.format(min_ms=result["settings"]["min_ms"], baseline=baseline)
    lines = ["# Speed and memory of attention", "", how]
    for point, members in groups_of(rows).items():
        lines += [f"## {title_of(point)[0].upper()}{title_of(point)[1:]}", ""]
        lines += [*_time_table(members, baseline), ""]
        measured = [row for row in members if row.peak_mib is not None]
        if measured:
            lines += [MEMORY, *_memory_table(members, measured), ""]
    if result["peers"]:
        lines += ["## What the other packages compute", ""]
        lines += [f"- **{package}**: {same}." for package, same in result["peers"].items()]
        lines += [""]
    if result["left_out"]:
        lines += ["## Left out", ""]
        for label, reasons in result["left_out"].items():
            for reason, sizes in reasons.items():
                lines.append(f"- {label} at {', '.join(map(str, sizes))}: {reason}.")
        lines += [""]
    hardware = result["hardware"]
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    lines += [
        f"{hardware['cpu']}, {hardware['cores']} cores"
        + (f", {hardware['gpu']}" if "gpu" in hardware else "")
        + f"; {versions}, commit {result['commit']}, seed {result['seed']}, {result['created']}."
    ]
    return "\n".join(lines) + "\n"


def _time_table(rows: Sequence[Row], baseline: str) -> list[str]:
    sizes = sorted({row.size for row in rows})

    def line(label: str, mine: dict[int, Row]) -> list[str]:
        exact = label == baseline
        steady = {n: r.seconds.median for n, r in mine.items() if not is_void(r.seconds)}
        peers = ", ".join(
            f"{row.vs_peer.median:.2f} {row.peer.partition(':')[0]} at {row.size:,}"
            for row in mine.values()
            if row.vs_peer is not None and not row.void
        )
        start = "" if exact else start_of(rows, label)
        cells = [_cell(mine[size], exact) if size in mine else "" for size in sizes]
        return [*cells, start, _two_digits(growth(steady)), peers]

    heads = [rows[0].point.kind, *(f"{size:,}" for size in sizes), "from", "growth", "× peer"]
    lines = markdown_table(heads, _by_label(rows, line), f"l{'r' * (len(sizes) + 2)}l")
    compiled = {row.contender.label: row.compile_seconds for row in rows if row.compile_seconds}
    if compiled:
        words = ", ".join(f"{label} {seconds:.0f}" for label, seconds in compiled.items())
        lines += ["", f"Seconds to compile, at the greatest length: {words}."]
    return lines


def _memory_table(rows: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    sizes = sorted({row.size for row in measured})

    def line(label: str, mine: dict[int, Row]) -> list[str]:
        peaks = {n: row.peak_mib for n, row in mine.items() if row.peak_mib is not None}
        cells = [f"{peaks[size]:,.0f}" if size in peaks else "" for size in sizes]
        return [*cells, _two_digits(growth(peaks) if all(peaks.values()) else None)]

    heads = [rows[0].point.kind, *(f"{size:,}" for size in sizes), "growth"]
    return markdown_table(heads, _by_label(rows, line), "lr")


def _by_label(
    rows: Sequence[Row], line: Callable[[str, dict[int, Row]], list[str]]
) -> Iterable[list[str]]:
    for label in dict.fromkeys(row.contender.label for row in rows):
        mine = {row.size: row for row in rows if row.contender.label == label}
        yield [f"`{label}`", *line(label, mine)]


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell(row: Row, exact: bool) -> str:
    if exact:
        text = f"{1e3 * row.seconds.median:.3g} ms ({row.seconds.count})"
    else:
        ratio = row.vs_exact
        text = f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})"
    return f"{text} void" if row.void else text


def _flat(row: Row) -> dict[str, Any]:
    point = row.point

    def three(name: str, summary: Summary | None, factor: float = 1.0) -> dict[str, Any]:
        found = {"": "median", "_q1": "q1", "_q3": "q3"}
        return {
            f"{name}{end}": summary and float(f"{factor * getattr(summary, field):.5g}")
            for end, field in found.items()
        }

    return {
        "contender": row.contender.label,
        "name": row.contender.name,
        "package": row.contender.peer,
        "mode": row.contender.mode,
        "kind": point.kind,
        "pass": point.task,
        "tokens": row.size,
        "shape": point.shape,
        **{name: getattr(point, name) or "" for name in ("dim", "num_heads", "head_dim")},
        "img_size": (point.size or "") if point.kind == "model" else "",
        "batch_size": point.batch_size,
        "dtype": point.dtype,
        "device": point.device,
        "threads": point.threads,
        "allocator": point.allocator,
        "clock": row.clock,
        **three("ms", row.seconds, 1e3),
        "rounds": row.seconds.count,
        "per_second": float(f"{row.per_second:.5g}"),
        **three("vs_exact", row.vs_exact),
        "peer": row.peer,
        **three("vs_peer", row.vs_peer),
        "void": row.void,
        "compile_seconds": row.compile_seconds,
        "peak_mib": row.peak_mib,
        "params": row.params,
    }
