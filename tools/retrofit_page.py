"""Tables and plots of the retrofit's evidence, from results/retrofit/DATA.

A folder has ``teacher.json``, ``teacher*.csv`` (epochs of its training, in one run or several),
``rows/NAME.{json,yaml,csv}`` (records, recipes and epochs of repairs), and what
`tools.retrofit_proof` measured: ``speed*.json`` and ``merging*.json``.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t

from timm_xformers.files.figures import COLOURS, MARKERS, new_figure, save
from timm_xformers.files.tables import figure, markdown_table
from timm_xformers.records.results_json import wilson_interval

__all__ = ["Evidence", "Row", "read_evidence", "retrofit_plot", "retrofit_tables"]

KINDS = {
    "swapped": "replaced, no repair",
    "aligned": "first part alone",
    "repaired": "both parts",
    "labels": "both parts, labels too",
    "scratch": "trained from scratch",
}


@dataclass(frozen=True)
class Row:
    """Runs that differ by seed alone.

    Attributes:
        title: Mechanism, and after @ the blocks that have it where others stayed exact.
        kind: One of `KINDS`.
        percent: Share of the teacher's training time, rounded.
        top1: Percent of the test images, one per seed; likewise below.
        agreement: Images on which it says what the teacher says; None from scratch.
        images: Test images.
        trained: Training images of the run, both parts, of the first seed.
    """

    title: str
    kind: str
    percent: int
    top1: list[float]
    agreement: list[float | None]
    images: int
    trained: int

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds, in percent."""
        return statistics.fmean(self.top1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: of the mean over seeds (Student), or of one run's images (Wilson)."""
        if len(self.top1) == 1:
            return _wilson(self.top1[0], self.images)
        half = t.ppf(0.975, len(self.top1) - 1) * statistics.stdev(self.top1)
        half /= len(self.top1) ** 0.5
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Evidence:
    """All of one data set.

    Attributes:
        teacher: Its accuracy on the rows' test images, in percent.
        teacher_seconds: Processor seconds of its training.
        rows: Best repaired first within a kind.
        merging: Rows of merging.json.
        speed: Rows of speed.json.
    """

    teacher: float
    teacher_seconds: float
    rows: list[Row]
    merging: list[dict[str, Any]]
    speed: list[dict[str, Any]]

    def faster(self, title: str, size: int) -> dict[str, Any] | None:
        """Speed of a contender at a size, if it was measured."""
        found = [r for r in self.speed if (r["contender"], r["img_size"]) == (title, size)]
        return found[0] if found else None

    @property
    def sizes(self) -> list[int]:
        """Sides of the images that were timed."""
        return sorted({row["img_size"] for row in self.speed})

    @property
    def shown(self) -> int:
        """Side at which speed stands beside accuracy: the second that was timed; 0 for none."""
        return self.sizes[min(1, len(self.sizes) - 1)] if self.sizes else 0


def read_evidence(folder: Path) -> Evidence:
    """Read the records of a data set."""
    seconds = sum(_column(path, "cpu_seconds") for path in folder.glob("teacher*.csv"))
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted((folder / "rows").glob("*.json")):
        record = json.loads(path.read_text())
        recipe = yaml.safe_load(path.with_suffix(".yaml").read_text())
        record["trained"] = _column(path.with_suffix(".csv"), "train_images")
        percent = round(100 * (recipe["max_seconds"] or 0) / seconds)
        key = _title(recipe["replace"]), _kind(recipe), percent
        groups.setdefault(key, []).append(record)
    rows = [
        Row(
            *key,
            top1=[record["test_top1_percent"] for record in records],
            agreement=[record["test_agreement_percent"] for record in records],
            images=records[0]["test_images"],
            trained=int(records[0]["trained"]),
        )
        for key, records in groups.items()
    ]
    order = list(KINDS)
    rows.sort(key=lambda row: (order.index(row.kind), row.percent, -row.mean))
    taught = {r["test_teacher_top1_percent"] for g in groups.values() for r in g} - {None}
    if len(taught) != 1:
        raise ValueError(f"Rows of {folder} were tested on different images: teacher {taught}.")
    return Evidence(
        taught.pop(),
        seconds,
        rows,
        *(_rows_of(folder, name) for name in ("merging", "speed")),
    )


def _wilson(percent: float, images: int) -> tuple[float, float]:
    low, high = wilson_interval(round(percent * images / 100), images)
    return 100 * low, 100 * high


def _rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"{name}*.json"))
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def _title(replace: dict[str, Any]) -> str:
    blocks = replace.get("blocks")
    return f"{replace['mechanism']}@{blocks}" if blocks else str(replace["mechanism"])


def _kind(recipe: dict[str, Any]) -> str:
    if recipe["teacher"] is None:
        return "scratch"
    if recipe["epochs"] == 0:
        return "swapped"
    if recipe["align_epochs"] == recipe["epochs"]:
        return "aligned"
    return "labels" if recipe["teacher_loss"].get("labels") else "repaired"


def _column(path: Path, name: str) -> float:
    """Sum over the epochs of a run; a run without epochs has no such file."""
    if not path.exists():
        return 0.0
    with path.open(newline="", encoding="utf-8") as file:
        return sum(float(row[name] or 0) for row in csv.DictReader(file))


def retrofit_tables(found: Evidence) -> list[str]:
    """Markdown: accuracy of every row, then speed."""
    sizes = found.sizes
    heads = [
        "attention",
        "repair",
        "time %",
        "images",
        "top-1 %",
        "95 %",
        "kept %",
        "agreement %",
        "seeds",
    ]
    heads += [f"times as fast at {found.shown} px"] if sizes else []
    lines = []
    for row in found.rows:
        agreed = [value for value in row.agreement if value is not None]
        low, high = row.interval
        cells = [
            f"`{row.title}`",
            KINDS[row.kind],
            str(row.percent),
            figure(row.trained, 0),
            f"{row.mean:.2f}",
            f"{low:.1f} to {high:.1f}",
            f"{100 * row.mean / found.teacher:.1f}",
            figure(statistics.fmean(agreed), 1) if agreed else "",
            str(len(row.top1)),
        ]
        lines.append(cells + _times(found, row.title, found.shown))
    for merged in found.merging:
        cells = [
            f"token merging, {merged['removed_per_block']} a block",
            "none",
            "0",
            "0",
            f"{merged['top1_percent']:.2f}",
            "{:.1f} to {:.1f}".format(*_wilson(merged["top1_percent"], merged["images"])),
            f"{100 * merged['top1_percent'] / found.teacher:.1f}",
            f"{merged['agreement_percent']:.1f}",
            "",
        ]
        lines.append(cells + _times(found, f"merging {merged['removed_per_block']}", found.shown))
    table = markdown_table(heads, lines, "llrrrrrrrr")
    return [*table, "", *_speed_table(found, sizes)] if sizes else table


def _times(found: Evidence, title: str, size: int) -> list[str]:
    if not found.sizes:
        return []
    row = found.faster(title, size)
    return ["" if row is None else f"{row['times_as_fast']:.2f}"]


def _speed_table(found: Evidence, sizes: Sequence[int]) -> list[str]:
    heads = ["one thread, one image"]
    for size in sizes:
        heads += [f"images/s at {size} px", "times as fast", "MiB of a pass"]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in found.speed):
        cells = [name if name == "teacher" or "merging" in name else f"`{name}`"]
        for size in sizes:
            row = found.faster(name, size)
            cells += (
                ["", "", ""]
                if row is None
                else [
                    f"{row['images_per_s']:.3g}",
                    f"{row['times_as_fast']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})",
                    f"{row['peak_mib']:.0f}",
                ]
            )
        lines.append(cells)
    return markdown_table(heads, lines, "lr")


def retrofit_plot(found: Evidence, path: Path, title: str) -> None:
    """Accuracy against the share of time that the repair had, and against speed."""
    drawn = new_figure(10, 4.2)
    left, right = drawn.subplots(1, 2)
    titles = list(dict.fromkeys(row.title for row in found.rows))
    for number, name in enumerate(titles):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        line = sorted(
            (row.percent, row.mean)
            for row in found.rows
            if row.title == name and row.kind in ("swapped", "repaired")
        )
        if line:
            left.plot(*zip(*line, strict=True), label=name, **style)
        fast = found.faster(name, found.shown)
        if fast and line:
            right.plot(fast["times_as_fast"], line[-1][1], linestyle="none", label=name, **style)
    for row in found.merging:
        fast = found.faster(f"merging {row['removed_per_block']}", found.shown)
        if fast:
            right.plot(fast["times_as_fast"], row["top1_percent"], "k+", label="token merging")
    for axes in (left, right):
        axes.axhline(found.teacher, color="black", linewidth=0.8, label="teacher")
        axes.axhline(0.98 * found.teacher, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel("test top-1 %")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=7)
    left.set_xlabel("repair, % of the teacher's training time")
    left.set_title(title, fontsize=10)
    right.set_xlabel(f"times as fast as the teacher at {found.shown} px")
    right.set_title("after the longest repair of both parts; dotted: 98 %", fontsize=10)
    save(drawn, path)
