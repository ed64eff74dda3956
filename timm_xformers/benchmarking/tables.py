"""benchmark.csv, benchmark.md and, for models, timm.csv."""

import csv
import dataclasses
import io
from collections.abc import Sequence
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

__all__ = [
    "csv_text",
    "groups_of",
    "lines_of",
    "markdown",
    "start_of",
    "timm_csv_text",
    "title_of",
]


def lines_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines of benchmark.csv: one per contender, point and clock."""
    return [_flat(row) for row in rows]


def csv_text(lines: Sequence[dict[str, Any]]) -> str:
    """Lines as a file; their columns are those of the first."""
    if not lines:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def timm_csv_text(rows: Sequence[Row]) -> str:
    """Models in the columns of timm's result files, so that both can be joined by ``model``."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        point = row.point
        if row.clock != "wall" or row.void or point.task not in ("forward", "train"):
            continue
        where = (point.dtype, point.device, point.threads, point.allocator)
        line = found.setdefault(
            (row.contender, point.size, where),
            {
                "model": row.contender.label,
                **{
                    f"{prefix}_{name}": ""
                    for prefix in ("infer", "train")
                    for name in ("samples_per_sec", "step_time", "batch_size", "img_size")
                },
                "param_count": round(row.params / 1e6, 2),
                **dict(zip(("dtype", "device", "threads", "allocator"), where, strict=True)),
            },
        )
        prefix = "infer" if point.task == "forward" else "train"
        line |= {
            f"{prefix}_samples_per_sec": round(row.per_second, 2),
            f"{prefix}_step_time": round(1e3 * row.seconds.median, 3),
            f"{prefix}_batch_size": point.batch_size,
            f"{prefix}_img_size": point.size or "",
        }
    return csv_text(list(found.values()))


def groups_of(rows: Sequence[Row]) -> dict[Point, list[Row]]:
    """Rows by the main clock, by what they share but length; the keys have size 0."""
    groups: dict[Point, list[Row]] = {}
    for row in rows:
        if row.clock == main_clock(row.point):
            groups.setdefault(dataclasses.replace(row.point, size=0), []).append(row)
    return groups


def start_of(rows: Sequence[Row], label: str) -> str:
    """From how many tokens on a contender is as fast as the baseline, in words."""
    steady = {row.size: row.vs_exact.median for row in rows if _is(row, label) and not row.void}
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
    """The benchmark as text.

    Args:
        result: What benchmark.json holds.
        rows: The measurements.
    """
    baseline = result["baseline"]
    lines = ["# Speed and memory of attention", "", *_how(result), ""]
    for point, members in groups_of(rows).items():
        lines += [f"## {title_of(point)[0].upper()}{title_of(point)[1:]}", ""]
        lines += [*_ratio_table(members, baseline), ""]
        if any(row.peak_mib is not None for row in members):
            lines += [
                "Peak memory of the steps, MiB over what was held before; the first 10 to 20 of a "
                "CPU are mostly library code that is used for the first time:",
                "",
            ]
            lines += [*_memory_table(members), ""]
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


def _how(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    return [
        "Every round calls every contender in shuffled order, each for at least "
        f"{settings['min_ms']:g} ms; ratios are taken within a round, and medians over rounds are "
        "given, with quartiles in brackets. Clocks: processor time at one thread, wall clock at "
        "several, the device's own time on a GPU; benchmark.csv has wall clock for all.",
        "",
        f"Cells: how many times faster than `{result['baseline']}`, whose row has milliseconds. "
        "*from*: tokens from which a contender is as fast, between two lengths by interpolation. "
        "*growth*: e in time or memory ~ tokens^e, fitted from 1,024 tokens up, where the "
        "contender was itself steady. *× peer*: how many times faster than the fastest other "
        "package's form, by length. *void*: the baseline's quartiles were further than 10 % from "
        "its median, so that none of it counts.",
    ]


def _ratio_table(rows: Sequence[Row], baseline: str) -> list[str]:
    sizes = sorted({row.size for row in rows})
    kind = rows[0].point.kind
    lines = [
        f"| {kind} | " + " | ".join(f"{size:,}" for size in sizes) + " | from | growth | × peer |",
        "| --- |" + " ---: |" * (len(sizes) + 2) + " --- |",
    ]
    for label in dict.fromkeys(row.contender.label for row in rows):
        mine = {row.size: row for row in rows if _is(row, label)}
        exact = label == baseline
        cells = [_cell(mine.get(size), exact) for size in sizes]
        own = {n: row.seconds for n, row in mine.items()}
        slope = growth({n: time.median for n, time in own.items() if not is_void(time)})
        lines.append(
            f"| `{label}` | {' | '.join(cells)} | {'' if exact else start_of(rows, label)} | "
            f"{'' if slope is None else f'{slope:.2f}'} | {_against_peers(mine.values())} |"
        )
    compiled = {row.contender.label: row.compile_seconds for row in rows if row.compile_seconds}
    if compiled:
        words = ", ".join(f"{label} {seconds:.0f}" for label, seconds in compiled.items())
        lines += ["", f"Seconds to compile, at the greatest length: {words}."]
    return lines


def _cell(row: Row | None, exact: bool) -> str:
    if row is None:
        return ""
    if exact:
        text = f"{1e3 * row.seconds.median:.3g} ms ({row.seconds.count})"
    else:
        text = _words(row.vs_exact)
    return f"{text} void" if row.void else text


def _words(summary: Summary) -> str:
    return f"{summary.median:.2f} ({summary.q1:.2f} to {summary.q3:.2f})"


def _against_peers(rows: Any) -> str:
    return ", ".join(
        f"{row.vs_peer.median:.2f} {row.peer.partition(':')[0]} at {row.size:,}"
        for row in rows
        if row.vs_peer is not None and not row.void
    )


def _memory_table(rows: Sequence[Row]) -> list[str]:
    sizes = sorted({row.size for row in rows if row.peak_mib is not None})
    lines = [
        f"| {rows[0].point.kind} | " + " | ".join(f"{size:,}" for size in sizes) + " | growth |",
        "| --- |" + " ---: |" * (len(sizes) + 1),
    ]
    for label in dict.fromkeys(row.contender.label for row in rows):
        mine = {
            row.size: row.peak_mib for row in rows if _is(row, label) and row.peak_mib is not None
        }
        cells = [f"{mine[size]:,.0f}" if size in mine else "" for size in sizes]
        slope = growth(mine) if all(mine.values()) else None
        cells.append("" if slope is None else f"{slope:.2f}")
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return lines


def _is(row: Row, label: str) -> bool:
    return row.contender.label == label


def _flat(row: Row) -> dict[str, Any]:
    point = row.point

    def three(name: str, summary: Summary | None, factor: float = 1.0) -> dict[str, Any]:
        values = (None,) * 3 if summary is None else (summary.median, summary.q1, summary.q3)
        keys = (name, f"{name}_q1", f"{name}_q3")
        return {
            key: "" if value is None else float(f"{factor * value:.5g}")
            for key, value in zip(keys, values, strict=True)
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
        "dim": point.dim or "",
        "num_heads": point.num_heads or "",
        "head_dim": point.head_dim or "",
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
        "compile_seconds": "" if row.compile_seconds is None else row.compile_seconds,
        "peak_mib": "" if row.peak_mib is None else row.peak_mib,
        "params": row.params,
    }
