"""Runs that differ in nothing but the seed, as one row: means, deviations, intervals."""

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from timm_xformers.files.tables import cell_text
from timm_xformers.recipe import NO_INFLUENCE
from timm_xformers.records.find_runs import Run
from timm_xformers.records.headline import Headline
from timm_xformers.records.results_json import Record

__all__ = [
    "METRICS",
    "SAME",
    "Estimate",
    "Group",
    "Metric",
    "difference",
    "group_runs",
    "interval_text",
    "mean_text",
    "sort_groups",
    "tally",
]

Metric = Literal["test", "val"]
METRICS: dict[Metric, str] = {"test": "test", "val": "validation"}

# Equal within a group: what was trained, on what, and how. Seed, commit, time and place are not.
SAME = (
    "kind",
    "data",
    "model",
    "model_kwargs",
    "img_size",
    "in_chans",
    "num_classes",
    "epochs",
    "batch_size",
    "num_processes",
    "mixed_precision",
    "recipe_hash",
    "params",
    "val_images",
    "test_images",
    "data_digest",
    "initial_weights",
)
# Said of a model, in this order, until no other on the same data is called the same: fields of the
# record, then what differs between the recipes, then the rest.
TELLING = (
    "model_kwargs",
    "img_size",
    "epochs",
    "batch_size",
    "mixed_precision",
    "num_processes",
    "initial_weights",
    "kind",
)
TELLING_LAST = ("recipe_hash", *SAME)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over runs in percent, or of differences in points, with its 95 % interval.

    Attributes:
        mean: Over the runs.
        deviation: Standard deviation of the sample of runs (n - 1); None for a single one.
        low: Lower end of the interval; NaN where there is none.
        high: Upper end of it.
        method: ``t``: Student's interval of the mean over seeds. ``Wilson``: of a single run, over
            the choice of images; ``Newcombe``: likewise, of a difference. ``none``: there is none,
            as of the mAP of a single run.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    method: Literal["t", "Wilson", "Newcombe", "none"]


def mean_text(found: Estimate | None, sign: str = "") -> str:
    """Mean ± deviation; with "+" as ``sign``, as of a difference."""
    if found is None:
        return ""
    deviation = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:{sign}.2f}{deviation}"


def interval_text(found: Estimate | None, sign: str = "") -> str:
    """Both ends, and the first letter of the method."""
    if found is None or found.method == "none":
        return ""
    return f"{found.low:{sign}.2f} to {found.high:{sign}.2f} *{found.method[0]}*"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: Name of the model, with as much more as sets it apart on its data.
        runs: At least one, by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def record(self) -> Record:
        """One of the records, for what all of them share."""
        return self.runs[0].record

    @property
    def seeds(self) -> list[int]:
        """Seeds that are known, ascending; a seed that was run twice is listed twice."""
        return [run.record.seed for run in self.runs if run.record.seed is not None]

    def values(self, field: str) -> list[float]:
        """A field over the runs that have it."""
        found = [getattr(run.record, field) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, field: str) -> float | None:
        """Mean of a field over the runs that have it."""
        values = self.values(field)
        return statistics.fmean(values) if values else None

    def peak(self, field: str) -> float | None:
        """Largest value of a field."""
        return max(self.values(field), default=None)

    def score(self, metric: Metric, kind: Headline | None = None) -> Estimate | None:
        """The headline in percent; None if it was not measured, or is not of the kind asked for."""
        headline = self.record.headline
        if kind not in (None, headline):
            return None
        values = self.values(f"{metric}_{headline.key}_percent")
        if len(values) < 2 and not headline.counted:
            return Estimate(values[0], None, math.nan, math.nan, "none") if values else None
        if len(values) < 2:
            intervals: Any = self.values(f"{metric}_{headline.key}_interval_percent")
            if not values or not intervals:
                return None
            low, high = intervals[0]
            return Estimate(values[0], None, low, high, "Wilson")
        found = _student(values)
        # Student's interval knows nothing of the ends of the scale.
        return dataclasses.replace(found, low=max(found.low, 0.0), high=min(found.high, 100.0))


def difference(group: Group, baseline: Group, metric: Metric) -> Estimate | None:
    """By how many points a group's accuracy is above a baseline's, seed by seed.

    Two or more seeds in common have Student's interval of their differences. A single one has
    Newcombe's (1998, method 10), of the two runs' Wilson intervals; it takes the answers of the two
    for independent, which on the same images makes it wider than it need be.

    Args:
        group: Whose accuracy.
        baseline: What it is compared with.
        metric: Which accuracy.

    Returns:
        None if no seed has been measured in both, or a seed of either has two runs.
    """
    field = f"{metric}_top1_percent"
    own, other = (
        {run.record.seed: run.record for run in g.runs if getattr(run.record, field) is not None}
        for g in (group, baseline)
    )
    shared = [seed for seed in own if seed in other and seed is not None]
    if any(len(set(g.seeds)) < len(g.seeds) for g in (group, baseline)) or not shared:
        return None
    gaps = [getattr(own[seed], field) - getattr(other[seed], field) for seed in shared]
    if len(gaps) > 1:
        return _student(gaps)
    ends = [getattr(side[shared[0]], f"{metric}_top1_interval_percent") for side in (own, other)]
    if None in ends:
        return None
    a, b = (getattr(side[shared[0]], field) for side in (own, other))
    (a_low, a_high), (b_low, b_high) = ends
    low = gaps[0] - math.hypot(a - a_low, b_high - b)
    high = gaps[0] + math.hypot(a_high - a, b - b_low)
    return Estimate(gaps[0], None, low, high, "Newcombe")


def _student(values: Sequence[float]) -> Estimate:
    from scipy.stats import t

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    margin = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Estimate(mean, deviation, mean - margin, mean + margin, "t")


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in nothing but the seed; their order is the runs' own."""
    members: dict[str, list[Run]] = {}
    for run in sorted(runs, key=_run_key):
        members.setdefault(_identity(run.record), []).append(run)
    namesakes: dict[tuple[str, str], list[str]] = {}
    for key, (first, *_) in members.items():
        namesakes.setdefault((first.record.data, first.record.model), []).append(key)
    words: dict[str, str] = {}
    for keys in namesakes.values():
        words |= zip(keys, _tell_apart([members[key][0] for key in keys]), strict=True)
    return [Group(found[0].record.model + words[key], (*found,)) for key, found in members.items()]


def tally(facts: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """How many of some mappings say what, by name; where a name is missing: ``unknown``."""
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: Counter(str(fact.get(name, "unknown")) for fact in facts) for name in names}


def sort_groups(groups: Sequence[Group], by: str, metric: Metric) -> list[Group]:
    """Order the rows of a report; what is unknown comes last, and names decide between equals.

    Args:
        groups: The rows.
        by: ``accuracy`` (best first), ``params``, ``seconds``, ``memory`` (least first) or
            ``name``.
        metric: Whose accuracy.
    """

    def key(group: Group) -> tuple[bool, float, str, str, str]:
        value: float | None
        if by == "accuracy":
            score = group.score(metric)
            value = None if score is None else -score.mean
        elif by == "memory":
            value = group.peak("peak_memory_mib")
        elif by == "name":
            value = 0.0
        else:
            value = group.mean(by)
        record = group.record
        return value is None, value or 0.0, group.label, record.data, _identity(record)

    return sorted(groups, key=key)


def _identity(record: Record) -> str:
    return json.dumps([getattr(record, name) for name in SAME], sort_keys=True)


def _run_key(run: Run) -> tuple[str, bool, int, str, str]:
    record = run.record
    return _identity(record), record.seed is None, record.seed or 0, record.created, run.source


def _tell_apart(runs: list[Run]) -> list[str]:
    """Words to put behind one model's name so that all of them differ."""
    of_records = {
        name: [cell_text(getattr(run.record, name)) for run in runs]
        for name in (*TELLING, *TELLING_LAST)
    }
    of_recipes = _differing_settings(runs)
    words = [""] * len(runs)
    for name in (*TELLING, *of_recipes, *TELLING_LAST):
        if len(set(words)) == len(runs):
            break
        values = of_recipes.get(name) or of_records[name]
        if len(set(values)) == 1:
            continue
        for index, value in enumerate(values):
            shown = value[:8] if name == "recipe_hash" else value
            text = shown if name == "model_kwargs" else f"{name}={shown}"
            words[index] += f", {text}" if value else ""
    return words


def _differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """Settings that shape a result and are not equal, with each run's; none if a recipe is lacking.

    Settings that set off most runs from each other come first.
    """
    known = [name for name in runs[0].settings if name not in (*NO_INFLUENCE, *SAME)]
    if not all(run.settings for run in runs):
        return {}
    values = {name: [cell_text(run.settings.get(name)) for run in runs] for name in known}
    differing = {name: texts for name, texts in values.items() if len(set(texts)) > 1}
    return dict(sorted(differing.items(), key=lambda entry: -len(set(entry[1]))))
