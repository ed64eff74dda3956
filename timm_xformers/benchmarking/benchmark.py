"""A benchmark from its settings to its folder.

One process per allocator and number of threads times all points; memory takes a fresh process for
every point and contender. What is known is written after every point, and the same command goes on
from there after it was killed.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import timm_xformers
from timm_xformers.benchmarking.cases import baseline_of, check, contenders_of, points_of
from timm_xformers.benchmarking.compare import Row, Summary, main_clock, rows_of
from timm_xformers.benchmarking.layers import build_sized
from timm_xformers.benchmarking.peers import PEERS, installed
from timm_xformers.benchmarking.plots import plot_benchmark
from timm_xformers.benchmarking.settings import PASSES, Contender, Point, Settings
from timm_xformers.benchmarking.tables import lines_of, markdown, timm_csv_text
from timm_xformers.benchmarking.worker import can_fork
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import sweep, write_text
from timm_xformers.files.tables import write_csv
from timm_xformers.records.results_json import origin
from timm_xformers.training.devices import MALLOC_OPTIONS, emulation_note

__all__ = ["Benchmark", "measure"]

WORKER = "timm_xformers.benchmarking.worker"
# How often a point is measured again as long as its baseline was not steady.
VOID_REPEATS = 2
# Read by glibc when a process starts; names of mallopt's options are in malloc.h.
MALLOC_NAMES = {-3: "MALLOC_MMAP_THRESHOLD_", -1: "MALLOC_TRIM_THRESHOLD_", -2: "MALLOC_TOP_PAD_"}


class Benchmark:
    """A benchmark under way.

    Args:
        settings: What to measure.

    Raises:
        UsageError: It cannot be measured.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings = check(settings)
        self.contenders = contenders_of(settings)
        self.points = points_of(settings)
        self.baseline = baseline_of(settings)
        self.rows: list[Row] = []
        self.left_out: dict[str, dict[str, list[int]]] = {}
        self.origin = origin(torch.device(settings.device or "cpu"))
        self.origin["versions"] |= installed({c.peer for c in self.contenders if c.peer})
        self.origin["hardware"]["vectors"] = torch.backends.cpu.get_cpu_capability()
        output = settings.output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            self._go_on()

    def run(self) -> Path:
        """Measure, and write.

        Returns:
            The Markdown file.

        Raises:
            UserError: The baseline failed, or a process that measures.
        """
        self.settings.output.mkdir(parents=True, exist_ok=True)
        precision = "bf16" if "bfloat16" in self.settings.dtypes else "no"
        note = emulation_note(precision, torch.device(self.settings.device or "cpu"))
        if note is not None:
            self._say(note)
        self._time([point for point in self.points if point not in self._timed()])
        for _ in range(VOID_REPEATS):
            self._time([point for point in self.points if self._timed()[point]])
        if self.settings.memory:
            self._measure_memory()
        plot_benchmark(self.settings.output, self.rows, self.baseline)
        self._write(complete=True)
        return self.settings.output / "benchmark.md"

    def _go_on(self) -> None:
        """Take over what a killed benchmark of the same settings has measured.

        Raises:
            UsageError: The folder holds something else, or a benchmark that is complete.
        """
        path = self.settings.output / "benchmark.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            same = before["settings"] == json.loads(json.dumps(self._settings()))
            if before["complete"] or not same:
                raise ValueError
            self.rows = [_row(values) for values in before["rows"]]
            self.left_out = before["left_out"]
        except (KeyError, OSError, TypeError, ValueError):
            raise UsageError(
                f"{self.settings.output} is not empty, and holds no unfinished benchmark of these "
                "settings; choose another --output."
            ) from None
        sweep(self.settings.output)

    def _timed(self) -> dict[Point, bool]:
        """The points that have rows, and whether those are void by the clock that counts."""
        return {row.point: row.void for row in self.rows if row.clock == main_clock(row.point)}

    def _time(self, points: Sequence[Point]) -> None:
        """Measure these points; what was known of them is replaced, one by one."""
        for found in self._measure("time", [(point, self.contenders) for point in points]):
            if self.baseline.label in found["left_out"]:
                raise UserError(
                    f"{self.baseline.label}, with which everything is compared, failed: "
                    f"{found['left_out'][self.baseline.label]}; use a smaller case."
                )
            point = Point(**found["point"])
            rows = rows_of(point, self.contenders, found, self.baseline.label, self._tokens(point))
            self._note(found["left_out"], self._tokens(point))
            others = [row for row in self.rows if row.point != point]
            self.rows = sorted([*others, *rows], key=lambda row: self.points.index(row.point))
            self._write()
            void = ", void: the baseline was not steady" if self._timed()[point] else ""
            self._say(
                f"time {self.points.index(point) + 1}/{len(self.points)}: {describe(point)}, "
                f"{rows[0].seconds.count} rounds of {len(found['seconds'])}{void}"
            )

    def _measure_memory(self) -> None:
        settings = self.settings
        heaviest = max((point.task for point in self.points), key=PASSES.index)
        timed = {(row.point, row.contender) for row in self.rows}
        work = [
            (point, [contender])
            for point in self.points
            if point.threads == settings.threads[0] and point.task == heaviest
            if settings.memory_tokens is None or point.size in settings.memory_tokens
            for contender in self.contenders
            if (point, contender) in timed
        ]
        peaks: dict[tuple[Point, Contender], float] = {}
        for number, ((point, (contender,)), found) in enumerate(
            zip(work, self._measure("memory", work), strict=True), start=1
        ):
            if "peak_mib" in found:
                peaks[point, contender] = found["peak_mib"]
            else:
                reason = {f"memory of {contender.label}": found["left_out"]}
                self._note(reason, self._tokens(point))
            self._say(f"memory {number}/{len(work)}: {contender.label}, {describe(point)}")
        self.rows = [
            dataclasses.replace(row, peak_mib=peaks.get((row.point, row.contender)))
            for row in self.rows
        ]

    def _measure(
        self, kind: str, work: Sequence[tuple[Point, Sequence[Contender]]]
    ) -> Iterator[dict[str, Any]]:
        names = ("rounds", "min_ms", "limit_seconds", "seed")
        effort = {name: getattr(self.settings, name) for name in names}
        yield from measure(kind, work, effort, self.settings.output / "log.txt")

    def _tokens(self, point: Point) -> int:
        """Tokens of a layer, or of the baseline model; pixels of its side where it has none."""
        if point.kind == "layer":
            return point.size
        with torch.device("meta"):
            model, expects = build_sized(self.baseline.name, point.size)
        patches: int = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
        prefix: int = getattr(model, "num_prefix_tokens", 0)
        return patches + prefix if patches else expects.shape[1]

    def _note(self, reasons: dict[str, str], size: int) -> None:
        for label, reason in reasons.items():
            sizes = self.left_out.setdefault(label, {}).setdefault(reason, [])
            if size not in sizes:
                sizes.append(size)

    def _say(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    def _settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings) | {"output": str(self.settings.output)}

    def _write(self, *, complete: bool = False) -> None:
        output = self.settings.output
        packages = {contender.peer for contender in self.contenders}
        result = {
            **self.origin,
            "seed": self.settings.seed,
            "settings": self._settings(),
            "complete": complete,
            "baseline": self.baseline.label,
            "peers": {peer.package: peer.same for peer in PEERS if peer.package in packages},
            "left_out": self.left_out,
            "rows": [
                {**dataclasses.asdict(row), "label": row.contender.label} for row in self.rows
            ],
        }
        write_text(output / "benchmark.json", json.dumps(result, indent=1) + "\n")
        write_csv(output / "benchmark.csv", lines_of(self.rows))
        write_text(output / "benchmark.md", markdown(result, self.rows))
        if self.settings.models:
            write_text(output / "timm.csv", timm_csv_text(self.rows))


def measure(
    kind: str,
    work: Sequence[tuple[Point, Sequence[Contender]]],
    effort: dict[str, Any],
    log: Path,
) -> Iterator[dict[str, Any]]:
    """Measure points in processes of their own.

    Args:
        kind: ``time``, of all contenders of a point side by side, or ``memory``, of one.
        work: Points of one device with their contenders; neighbours share a process where they
            have the same allocator and number of threads.
        effort: ``rounds``, ``min_ms``, ``limit_seconds`` and ``seed`` of `Settings`.
        log: Receives what the processes say.

    Yields:
        For each point what `worker.measure_time` or `worker.measure_memory` found.

    Raises:
        UserError: A process ended early.
    """
    # Memory takes copies of one process that has only imported, or one from scratch for each.
    alone = kind == "memory" and work and not can_fork(work[0][0].device)
    together = itertools.groupby(work, lambda case: (case[0].allocator, case[0].threads))
    for part in [[case] for case in work] if alone else [list(part) for _, part in together]:
        yield from _in_process(kind, part, effort, log)


def _in_process(
    kind: str,
    work: Sequence[tuple[Point, Sequence[Contender]]],
    effort: dict[str, Any],
    log: Path,
) -> Iterator[dict[str, Any]]:
    first = work[0][0]
    job = {
        "kind": kind,
        "device": first.device,
        "threads": first.threads,
        "effort": effort,
        "work": [
            {"point": dataclasses.asdict(point), "contenders": [*map(dataclasses.asdict, who)]}
            for point, who in work
        ],
    }
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as given,
        log.open("a", encoding="utf-8") as errors,
    ):
        json.dump(job, given)
        given.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environ(first.allocator, first.threads),
        ) as process:
            try:
                for line in process.stdout or ():
                    yield json.loads(line)
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        last = (log.read_text(encoding="utf-8").strip() or "nothing").splitlines()[-1]
        raise UserError(
            f"A process that measures ended with code {process.returncode}: {last} (all in "
            f"{log}; code -9 means that memory ran out)."
        )


def _row(values: dict[str, Any]) -> Row:
    """A row of benchmark.json."""
    known = {field.name: values[field.name] for field in dataclasses.fields(Row)}
    for name in ("seconds", "vs_exact", "vs_peer"):
        known[name] = known[name] and Summary(**known[name])
    point, contender = Point(**known["point"]), Contender(**known["contender"])
    return Row(**(known | {"point": point, "contender": contender}))


def describe(point: Point) -> str:
    """A point in words."""
    where = f"{point.shape}, {point.size} tokens" if point.kind == "layer" else "models"
    if point.kind == "model" and point.size:
        where += f" at {point.size} pixels"
    return (
        f"{point.task}, {where}, batch {point.batch_size}, {point.dtype}, {point.device}, "
        f"{point.threads} threads, {point.allocator} allocator"
    )


def environ(allocator: str, threads: int) -> dict[str, str]:
    """Environment of a process that measures, whatever the own one says about these things."""
    root = str(Path(timm_xformers.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    tuned = {MALLOC_NAMES[option]: str(value) for option, value in MALLOC_OPTIONS.items()}
    return {
        **inherited,
        **(tuned if allocator == "tuned" else {}),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
