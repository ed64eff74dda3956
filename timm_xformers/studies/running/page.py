"""The page of a study, from its file, its records and its costs alone."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.files.tables import cell_text, column_table, csv_text, figure
from timm_xformers.recipe import NO_INFLUENCE, Recipe
from timm_xformers.records.find_runs import Run
from timm_xformers.studies.comparing.groups import (
    METRICS,
    Estimate,
    Group,
    Metric,
    difference,
    interval_text,
    mean_text,
    tally,
)
from timm_xformers.studies.comparing.report_plots import Cost, picture_titles, plot_report
from timm_xformers.studies.running.costs import read_costs
from timm_xformers.studies.running.definition import Study
from timm_xformers.studies.running.folder import StudyFolder

__all__ = ["Row", "page_files", "study_rows", "write_page"]

# Costs that pictures show: file, label of the axis, column of `Row.costs`.
COSTS = (
    ("accuracy_training.png", "Training: milliseconds an image", "train_ms"),
    ("accuracy_inference.png", "Inference: milliseconds an image", "infer_ms"),
    ("accuracy_memory.png", "Peak memory of a training step (MiB)", "peak_mib"),
    ("accuracy_gmacs.png", "Billions of multiply-adds an image, forward", "gmacs"),
    ("accuracy_params.png", "Parameters", "params"),
    ("accuracy_seconds.png", "Processor seconds of a run's training", "cpu_seconds"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm on a data set.

    Attributes:
        arm: Its name.
        data: The data set.
        group: Its finished runs; None if there is none.
        missing: Seeds without a record.
        gap: How far it is above the baseline, over the seeds that both have.
        costs: Whatever is known of `COSTS`, ratios to the baseline, and whether it was steady.
    """

    arm: str
    data: str
    group: Group | None
    missing: list[int]
    gap: Estimate | None
    costs: dict[str, Any]


def write_page(study: Study, root: Path, page: Path) -> list[str]:
    """Write a page, its pictures and its table as CSV beside it, in a folder of its name.

    Returns:
        What was left out, and why.

    Raises:
        UserError: There is no record yet, or the records do not fit the file.
    """
    if page.suffix != ".md":
        raise UsageError(f"{page} is no name for a page; end it in .md.")
    content = _Page(study, root, page)
    assets = page.with_suffix("")
    try:
        assets.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create {assets}: {error.strerror}; choose another page."
        ) from error
    plot_report(assets, content.groups, study.metric, content.drawn_costs())
    for path, text in content.files().items():
        write_text(path, text)
    return content.others


def study_rows(study: Study, root: Path) -> list[Row]:
    """What the page's table holds: an arm on a data set each, in the order of the file."""
    folder = StudyFolder(root)
    return _rows(study, folder.finished(study)[0], read_costs(folder, study))


def _rows(
    study: Study, finished: Mapping[tuple[str, int], Run], costs: Mapping[str, Any]
) -> list[Row]:
    rows: list[Row] = []
    for data in study.data:
        measured = costs.get("data", {}).get(data, {}).get("arms", {})
        groups: dict[str, Group | None] = {}
        missing: dict[str, list[int]] = {}
        for arm in study.arms:
            runs = [run for run in study.runs if (run.arm, run.data) == (arm.name, data)]
            found = tuple(finished[run.key] for run in runs if run.key in finished)
            groups[arm.name] = Group(arm.name, found) if found else None
            missing[arm.name] = [run.seed for run in runs if run.key not in finished]
        reference = groups[study.baseline]
        for name, group in groups.items():
            gap = None
            if group is not None and reference is not None and name != study.baseline:
                gap = difference(group, reference, study.metric)
            spent = _costs_of(group, measured.get(name, {}), measured.get(study.baseline, {}))
            rows.append(Row(name, data, group, missing[name], gap, spent))
    return rows


def page_files(study: Study, root: Path, page: Path, base: Path) -> dict[Path, str]:
    """The page, whose paths start from ``base``, and its table as text, by file."""
    return _Page(study, root, page, base).files()


class _Page:
    """What `write_page` takes, and what the folder of the study holds of it."""

    def __init__(self, study: Study, root: Path, page: Path, base: Path | None = None) -> None:
        folder = StudyFolder(root)
        finished, self.others = folder.finished(study)
        if not finished:
            raise UserError(
                f"There is no record of {study.source} in {folder.records} yet; train first, or "
                "name the folder by --output."
            )
        self.study, self.path = study, page
        self.file, self.root, self.page = (
            Path(os.path.relpath(path, base)).as_posix() for path in (study.source, root, page)
        )
        self.costs = read_costs(folder, study)
        self.rows = _rows(study, finished, self.costs)
        self.groups = [row.group for row in self.rows if row.group is not None]

    def drawn_costs(self) -> dict[str, Cost]:
        """What pictures show of `COSTS`."""
        return {
            file: Cost(
                f"Accuracy against: {label[0].lower()}{label[1:]}",
                label,
                [row.costs.get(name) for row in self.rows if row.group is not None],
            )
            for file, label, name in COSTS
        }

    def files(self) -> dict[Path, str]:
        """The page and its table."""
        table = self.path.with_suffix("") / "table.csv"
        return {self.path: self._markdown(), table: csv_text(map(_csv_row, self.rows))}

    def _markdown(self) -> str:
        study = self.study
        done = sum(len(group.runs) for group in self.groups)
        lines = [f"<!-- Written by `timm-xformers study {self.file} --report`. -->", ""]
        lines += [f"# {study.title}", "", study.question, "", "## Protocol", ""]
        lines += [study.protocol, "", *self._protocol()]
        lines += ["", "## Results", ""]
        if done < len(study.runs):
            lines += [f"**Not complete: {done} of {len(study.runs)} runs are finished.**", ""]
        for data in study.data:
            mine = [row for row in self.rows if row.data == data]
            if len(study.data) > 1:
                lines += [f"### {data}", ""]
            lines += [*_table(study, mine), "", *_findings(study, mine), ""]
        lines += self._reading()
        for name, title in picture_titles(self.groups, study.metric, self.drawn_costs()).items():
            lines += ["", f"![{title}]({Path(self.page).stem}/{name})"]
        if study.conclusions:
            lines += ["", "## Conclusions", "", study.conclusions]
        lines += ["", "## Records", "", *self._provenance()]
        single = [line for at, line in enumerate(lines) if line or (at and lines[at - 1])]
        return "\n".join(single).rstrip() + "\n"

    def _protocol(self) -> list[str]:
        study, recipe = self.study, self.study.recipe
        plural = "" if recipe.epochs == 1 else "s"
        budget = f"{recipe.epochs} epoch{plural}, the same updates for all"
        if recipe.max_steps:
            budget = f"{recipe.max_steps:,} updates for each"
        if recipe.max_seconds:
            budget = f"{recipe.max_seconds:,.0f} processor seconds of training for each"
        lines = [
            f"- {len(study.arms)} arms x {len(study.seeds)} "
            f"seed{'s' if len(study.seeds) > 1 else ''} ({cell_text(study.seeds)})"
            + "".join(
                f", `{arm.name}` {cell_text(arm.seeds)}"
                for arm in study.arms
                if arm.seeds != study.seeds
            )
            + (f" x {len(study.data)} data sets" if len(study.data) > 1 else "")
            + f", compared with `{study.baseline}`. Budget: {budget}."
        ]
        for data in study.data:
            record = next(
                (group.record for group in self.groups if group.record.data == data), None
            )
            if record is None:
                continue
            split = f"{data}: {record.img_size} x {record.img_size} pixels"
            if record.val_images:
                split += f"; {record.val_images:,} validation images chose the epoch of each run"
            if record.test_images:
                split += f"; {record.test_images:,} test images were read once per run"
            lines.append(f"- {split}.")
        plain = dataclasses.asdict(Recipe())
        changed = {
            name: value
            for name, value in dataclasses.asdict(recipe).items()
            if value != plain[name] and name not in (*NO_INFLUENCE, "model", "data")
        }
        words = ", ".join(f"`{name}: {cell_text(value)}`" for name, value in changed.items())
        lines.append(
            f"- Settings that are not the default: {words or 'none'}. All are in `{self.file}`."
        )
        return lines

    def _reading(self) -> list[str]:
        costs = self.costs
        lines = [
            "Accuracies are means over the seeds ± standard deviation (n − 1). Intervals marked "
            "*t* are Student's, over seeds; *W*, of one seed, is Wilson's over the choice of "
            "images, and *N* Newcombe's of a difference. Differences are taken seed by seed, in "
            "points. In the plots a dashed line joins the arms that no other beats in both cost "
            "and mean accuracy (Pareto's front)."
        ]
        if any(arm.published for arm in self.study.arms):
            lines[0] += (
                " Published figures are of others, at their own budget, geometry and choice of "
                "epoch: landmarks, not comparisons."
            )
        if not costs:
            return [*lines, "Speed and memory have not been measured."]
        for data, entry in costs["data"].items():
            effort = costs["effort"]
            hardware = costs["hardware"]
            device = hardware.get("gpu") or f"{costs['threads']} thread of {hardware['cpu']}"
            lines.append(
                f"Speed on {data}: batches of {entry['batch_size']} images of "
                f"{entry['img_size']} pixels, {entry['dtype']}, {entry['mode']}, on {device}, by "
                f"the {entry['clock']} clock, in at most {effort['rounds']} shuffled rounds: the "
                "baseline's median, and for the others that times the median of the rounds' "
                "ratios, which is in brackets. A training step is forward, backward and AdamW; "
                "memory is of that step, in a process of its own."
            )
        unsteady = [
            f"`{row.arm}` ({kind})"
            for row in self.rows
            for kind, name in (("training", "train"), ("inference", "infer"))
            if row.costs.get(f"{name}_steady") is False
        ]
        if unsteady:
            lines.append(f"**Mind:** the rounds were not steady for {', '.join(unsteady)}.")
        return ["\n\n".join(lines)]

    def _provenance(self) -> list[str]:
        records = [run.record for group in self.groups for run in group.runs]
        costs = self.costs
        published = any(arm.published for arm in self.study.arms)
        others = ", but for those of others," if published else ""
        lines = [
            f"Every figure above{others} is computed from the records in `{self.root}/records`"
            + (f" and `{self.root}/costs.json`" if costs else "")
            + f". With all digits they are in [table.csv]({Path(self.page).stem}/table.csv). To "
            "make the page again, and to train what is missing:",
            "",
            "```bash",
            f"timm-xformers study {self.file} --output {self.root} --report {self.page}",
            f"timm-xformers study {self.file} --output {self.root} --data-dir FOLDER",
            "```",
            "",
        ]
        for what in ("versions", "hardware"):
            facts = tally([getattr(record, what) for record in records])
            words = ", ".join(f"{name} {' and '.join(seen)}" for name, seen in facts.items())
            lines.append(f"- {what.capitalize()} of the runs: {words}.")
        commits = sorted({(record.commit or "unknown")[:8] for record in records})
        lines.append(f"- Code: {', '.join(commits)}.")
        if costs:
            lines.append(
                f"- Costs: measured {costs['created']}, code {(costs['commit'] or '?')[:8]}."
            )
        return lines


def _costs_of(
    group: Group | None, own: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, Any]:
    """Costs of an arm, of the baseline and the arm as measured, for the page.

    The arm's speed is the baseline's times the paired ratio, the steadier figure.
    """
    found = {key: own[key] for key in ("params", "gmacs", "peak_mib") if key in own}
    for kind in ("train", "infer"):
        if f"{kind}_ratio" in own and f"{kind}_img_s" in reference:
            ratio = own[f"{kind}_ratio"][0]
            found[f"{kind}_ratio"] = ratio
            found[f"{kind}_img_s"] = reference[f"{kind}_img_s"][0] * ratio
            found[f"{kind}_ms"] = 1e3 / found[f"{kind}_img_s"]
            found[f"{kind}_steady"] = own[f"{kind}_steady"]
    if group is not None:
        found["params"] = group.record.params
        seconds = group.mean("cpu_seconds")
        if seconds is not None:
            found["cpu_seconds"] = seconds
    return found


def _table(study: Study, rows: Sequence[Row]) -> list[str]:
    metric, baseline = study.metric, study.baseline
    published = {
        arm.name: f"{arm.published['percent']:.2f} ({arm.published['what']})"
        if arm.published
        else ""
        for arm in study.arms
    }
    columns: dict[str, Callable[[Row], Any]] = {
        "arm": lambda row: f"`{row.arm}`" + (" (baseline)" if row.arm == baseline else ""),
        "seeds": _seeds,
        f"{METRICS[metric]} top-1 %": lambda row: mean_text(_top1(row, metric)) or "missing",
        "95 %": lambda row: interval_text(_top1(row, metric)),
        "published": lambda row: published[row.arm],
        f"above `{baseline}`": lambda row: mean_text(row.gap, "+"),
        "95 % ": lambda row: interval_text(row.gap, "+"),
        "parameters": lambda row: figure(row.costs.get("params"), 0),
        "GMACs": lambda row: figure(row.costs.get("gmacs"), 4),
        "training, images/s": lambda row: _speed(row, "train"),
        "inference, images/s": lambda row: _speed(row, "infer"),
        "peak MiB": lambda row: figure(row.costs.get("peak_mib"), 0),
        "processor s": lambda row: figure(row.costs.get("cpu_seconds"), 0),
    }
    return column_table(columns, rows, "llr")


def _top1(row: Row, metric: Metric) -> Estimate | None:
    return None if row.group is None else row.group.score(metric)


def _seeds(row: Row) -> str:
    there = cell_text(row.group.seeds) if row.group is not None else ""
    gone = f"{cell_text(row.missing)} missing" if row.missing else ""
    return ", ".join(filter(None, (there, gone)))


def _speed(row: Row, kind: str) -> str:
    speed, ratio = row.costs.get(f"{kind}_img_s"), row.costs.get(f"{kind}_ratio")
    if speed is None:
        return ""
    return f"{speed:,.0f}" + ("" if ratio is None else f" (x {ratio:.2f})")


def _findings(study: Study, rows: Sequence[Row]) -> list[str]:
    """What the intervals say and what they do not."""
    compared = [row for row in rows if row.gap is not None]
    if not compared:
        return ["No arm can be compared with the baseline yet."]
    sides: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for row in compared:
        assert row.gap is not None
        side = "better" if row.gap.low > 0 else "worse" if row.gap.high < 0 else "not told apart"
        sides[side].append(f"`{row.arm}`")
    said = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    lines = [
        f"- Against `{study.baseline}`, by whether the interval of the difference holds zero: "
        f"{said}."
    ]
    if len(compared) > 1:
        lines.append(
            f"- Each of the {len(compared)} intervals holds at 95 % by itself: of so many, "
            f"{0.05 * len(compared):.1f} are expected to miss by chance. Differences between two "
            "arms that are not the baseline were not estimated."
        )
    if any(row.gap and row.gap.method == "Newcombe" for row in compared):
        lines.append(
            "- Intervals marked *N* are of a single seed. They know of the choice of test images, "
            "not of how much another seed would change."
        )
    absent = [row for row in rows if row.missing]
    if absent:
        words = "; ".join(f"`{row.arm}` seed {cell_text(row.missing)}" for row in absent)
        lines.append(f"- Missing: {words}. These arms' figures are over fewer seeds.")
    seconds = [row.costs["cpu_seconds"] for row in rows if "cpu_seconds" in row.costs]
    if not study.recipe.max_seconds and len(seconds) > 1:
        lines.append(
            "- The arms made the same updates, not the same use of time: the dearest took "
            f"{max(seconds) / min(seconds):.1f} times the processor seconds of the cheapest."
        )
    return lines


def _csv_row(row: Row) -> dict[str, Any]:
    """A line of table.csv, with all digits."""
    values: dict[str, Any] = {"data": row.data, "arm": row.arm}
    values |= {"seeds": row.group.seeds if row.group else [], "missing": row.missing}
    for metric in METRICS:
        values |= _csv_estimate(f"{metric}_top1", _top1(row, metric))
    values |= _csv_estimate("above_baseline", row.gap)
    names = [name for _, _, name in COSTS] + ["train_img_s", "infer_img_s"]
    names += ["train_ratio", "infer_ratio"]
    return values | {name: row.costs.get(name) for name in names}


def _csv_estimate(name: str, found: Estimate | None) -> dict[str, Any]:
    return {
        f"{name}_{field.name}": getattr(found, field.name, None)
        for field in dataclasses.fields(Estimate)
    }
