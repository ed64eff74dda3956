"""A comparison of runs: report.md with pictures, report.csv by group, runs.csv by run."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.files.tables import cell_text, column_table, figure, write_csv
from timm_xformers.records.find_runs import Skipped, find_runs
from timm_xformers.records.headline import AGREEMENT, HEADLINES, MAP, TOP1, Headline
from timm_xformers.studies.comparing.groups import (
    METRICS,
    SAME,
    Estimate,
    Group,
    Metric,
    group_runs,
    interval_text,
    mean_text,
    sort_groups,
    tally,
)
from timm_xformers.studies.comparing.report_plots import Cost, plot_report

__all__ = ["Report", "count_runs", "report"]

# Means over the runs of a group, as report.csv calls them.
MEANS = ("seconds", "images_per_s", "data_wait_percent", "step_ms")
COLUMNS: dict[str, Callable[[Group], Any]] = {
    "model": lambda g: f"`{g.label}`",
    "data": lambda g: g.record.data,
    "parameters": lambda g: f"{g.record.params:,}",
    "epochs": lambda g: figure(g.record.epochs, 0),
    "runs (seeds)": lambda g: f"{len(g.runs)}" + (f" ({cell_text(g.seeds)})" if g.seeds else ""),
    "test top-1 %": lambda g: mean_text(g.score("test", TOP1)),
    "test mAP %": lambda g: mean_text(g.score("test", MAP)),
    "test agreement %": lambda g: mean_text(g.score("test", AGREEMENT)),
    "95 %": lambda g: interval_text(g.score("test")),
    "test F1 micro %": lambda g: figure(g.mean("test_f1_micro_percent"), 2),
    "test F1 macro %": lambda g: figure(g.mean("test_f1_macro_percent"), 2),
    "validation top-1 %": lambda g: mean_text(g.score("val", TOP1)),
    "validation mAP %": lambda g: mean_text(g.score("val", MAP)),
    "validation agreement %": lambda g: mean_text(g.score("val", AGREEMENT)),
    "95 % ": lambda g: interval_text(g.score("val")),
    "seconds": lambda g: figure(g.mean("seconds"), 1),
    "images/s": lambda g: figure(g.mean("images_per_s"), 0),
    "data wait %": lambda g: figure(g.mean("data_wait_percent"), 1),
    "ms per update": lambda g: figure(g.mean("step_ms"), 1),
    "peak MiB": lambda g: figure(g.peak("peak_memory_mib"), 0),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was compared: the Markdown file, its rows, and what was left out and why."""

    path: Path
    groups: list[Group]
    skipped: list[Skipped]


def report(
    paths: Sequence[Path], output: Path, *, sort: str = "accuracy", metric: Metric = "test"
) -> Report:
    """Compare runs and write the comparison.

    Args:
        paths: See `find_runs`.
        output: Folder for the files; those of an earlier report are replaced, others stay.
        sort: See `sort_groups`.
        metric: Accuracy to sort and draw by.

    Raises:
        UserError: No usable run.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; choose a folder as --output.")
    runs, skipped = find_runs(paths)
    if not runs:
        reasons = "; ".join(f"{entry.source} {entry.reason}" for entry in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise UserError(f"There is no finished run to compare: {reasons}{more}.")
    groups = sort_groups(group_runs(runs), sort, metric)
    output.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in HEADLINES if any(g.record.headline is kind for g in groups)]
    write_csv(output / "report.csv", [_group_row(group, kinds) for group in groups])
    write_csv(
        output / "runs.csv",
        [
            {"source": run.source, "label": group.label, **_cells(dataclasses.asdict(run.record))}
            for group in groups
            for run in group.runs
        ],
    )
    plots = plot_report(output, groups, metric, _costs(groups))
    path = output / "report.md"
    write_text(path, _markdown(groups, skipped, plots, sort, metric))
    return Report(path, groups, skipped)


def count_runs(groups: Sequence[Group]) -> str:
    """Words such as ``3 runs in 1 group``."""
    counts = {"run": sum(len(group.runs) for group in groups), "group": len(groups)}
    return " in ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items())


def _costs(groups: list[Group]) -> dict[str, Cost]:
    # An evaluation's seconds are something else than a training's.
    seconds = [group.mean("seconds") if group.record.kind == "train" else None for group in groups]
    params = [group.record.params for group in groups]
    memory = [group.peak("peak_memory_mib") for group in groups]
    return {
        "accuracy_seconds.png": Cost(
            "Accuracy against seconds of training", "Seconds of training", seconds
        ),
        "accuracy_params.png": Cost("Accuracy against parameters", "Parameters", params),
        "accuracy_memory.png": Cost("Accuracy against peak memory", "Peak memory (MiB)", memory),
    }


def _markdown(
    groups: list[Group],
    skipped: list[Skipped],
    plots: Mapping[str, str],
    sort: str,
    metric: Metric,
) -> str:
    records = [run.record for group in groups for run in group.runs]
    words = " and ".join(dict.fromkeys(record.headline.word for record in records))
    lines = [f"# {count_runs(groups)}", "", *column_table(COLUMNS, groups, "llrrlr")]
    lines += [
        "",
        f"Sorted by {f'{METRICS[metric]} {words}' if sort == 'accuracy' else sort}. Accuracies are "
        "means over the runs of a group ± standard deviation (n - 1). 95 % intervals marked *t* "
        "are Student's, of the mean over seeds on these images; those marked *W* are Wilson's, of "
        "a single run over the choice of images. Seconds are of training without validation; times "
        "and speeds are means, memory is the highest run's.",
        "",
    ]
    shared = []
    for what in ("versions", "hardware"):
        counts = tally([getattr(record, what) for record in records])
        same = [f"{name} {next(iter(seen))}" for name, seen in counts.items() if len(seen) == 1]
        if same:
            shared.append(f"{what.capitalize()}: {', '.join(same)}.")
    lines += [" ".join(shared), ""]
    lines += [f"**Mind:** {note}" for note in _notes(groups)]
    lines += [f"![{title}]({name})\n" for name, title in plots.items()]
    if skipped:
        lines += ["", "Left out:", ""]
        lines += [f"- `{entry.source}` {entry.reason}" for entry in skipped]
    return "\n".join(lines).rstrip() + "\n"


def _notes(groups: list[Group]) -> list[str]:
    """What a reader must know before comparing."""
    records = [run.record for group in groups for run in group.runs]
    notes = []
    commits = [{"commit": (record.commit or "unknown")[:8]} for record in records]
    for kind, facts, effect in (
        ("hardware", [record.hardware for record in records], "times and memory do not compare"),
        ("versions", [record.versions for record in records], "times may not compare"),
        ("commits", commits, "the code was not the same"),
    ):
        details = "; ".join(
            f"{name} {', '.join(f'{value} ({count})' for value, count in sorted(seen.items()))}"
            for name, seen in tally(facts).items()
            if len(seen) > 1
        )
        if details:
            notes.append(f"mixed {kind}, so {effect}: {details} (runs in brackets).\n")
    if len({record.headline for record in records}) > 1:
        notes.append("top-1, of one class an image, and mAP, of several, do not compare.\n")
    sets = sorted({record.data for record in records})
    if len(sets) > 1:
        notes.append(f"accuracies on {', '.join(sets)} do not compare with one another.\n")
    told: dict[str, list[str]] = {}
    for group in groups:
        for text in dict.fromkeys(run.record.reservations for run in group.runs):
            told.setdefault(text, []).append(f"`{group.label}`")
    told.pop("", None)
    notes += [f"of the data of {', '.join(who)}: {text}.\n" for text, who in told.items()]
    for group in groups:
        again = [seed for seed, count in Counter(group.seeds).items() if count > 1]
        if again:
            words = ", ".join(map(str, again))
            notes.append(f"`{group.label}` has seed {words} more than once, as if independent.\n")
    return notes


def _group_row(group: Group, kinds: Sequence[Headline]) -> dict[str, Any]:
    """A line of report.csv, with columns for these kinds of figures."""
    row: dict[str, Any] = {"label": group.label}
    row |= _cells({name: getattr(group.record, name) for name in SAME})
    row |= {"runs": len(group.runs), "seeds": cell_text(group.seeds)}
    for metric, kind in itertools.product(METRICS, kinds):
        score = group.score(metric, kind)
        for field in dataclasses.fields(Estimate):
            name = field.name + ("" if field.name == "method" else "_percent")
            row[f"{metric}_{kind.key}_{name}"] = _rounded(getattr(score, field.name, None))
    row |= {f"{name}_mean": _rounded(group.mean(name)) for name in MEANS}
    return row | {"peak_memory_mib_max": group.peak("peak_memory_mib")}


def _cells(values: dict[str, Any]) -> dict[str, Any]:
    """Mappings and lists as JSON, which programs read back."""
    return {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in values.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value
