"""From seconds of rounds to ratios, crossovers and growth."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm_xformers.benchmarking.settings import Contender, Point

__all__ = [
    "Row",
    "Summary",
    "crossover",
    "growth",
    "is_void",
    "main_clock",
    "ratios",
    "rows_of",
    "summarise",
]

# Times whose quartiles are further from their median than this share were disturbed.
STEADY = 0.1
# Below, a layer's time is calls rather than tokens.
GROWTH_FROM = 1024


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of rounds."""

    median: float
    q1: float
    q3: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender at a point, by one clock.

    Attributes:
        point: Where.
        contender: Who.
        clock: ``cpu`` (time of the process), ``wall`` or ``gpu`` (time of the device).
        size: Tokens of a layer, pixels of a model.
        seconds: Of a call.
        vs_exact: How many times faster than the baseline, within each round.
        peer: The fastest peer of the same mechanism; empty: none ran, or this is one.
        vs_peer: How many times faster than it.
        void: The baseline was not steady, so none of it counts.
        params: Number of parameters.
        compile_seconds: What the first call took longer than the second, if compiled.
        peak_mib: Memory over what was held before the first step, in a process of its own.
    """

    point: Point
    contender: Contender
    clock: str
    size: int
    seconds: Summary
    vs_exact: Summary
    peer: str
    vs_peer: Summary | None
    void: bool
    params: int
    compile_seconds: float | None
    peak_mib: float | None = None

    @property
    def per_second(self) -> float:
        """Sequences or images in a second."""
        return self.point.batch_size / self.seconds.median


def main_clock(point: Point) -> str:
    """The clock that claims are made by."""
    if point.device == "cuda":
        return "gpu"
    return "cpu" if point.threads == 1 else "wall"


def summarise(values: Sequence[float]) -> Summary:
    """Median and quartiles; those of a single value are the value."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, q1, q3, len(values))


def ratios(reference: Sequence[float], own: Sequence[float]) -> Summary:
    """How many times faster than a reference, round by round; never median by median."""
    return summarise([theirs / ours for theirs, ours in zip(reference, own, strict=True)])


def is_void(times: Summary) -> bool:
    """Whether a contender was disturbed too much; if the baseline, nothing beside it counts."""
    low, high = (1 - STEADY) * times.median, (1 + STEADY) * times.median
    return times.q1 < low or times.q3 > high


def rows_of(
    point: Point,
    contenders: Sequence[Contender],
    found: Mapping[str, Any],
    baseline: str,
    size: int,
) -> list[Row]:
    """Rows of a point, contender by contender, clock by clock; what has no seconds has no row.

    Args:
        point: Where.
        contenders: In the order of the rows.
        found: What `worker.measure_time` gave.
        baseline: Label of the contender to compare with.
        size: See `Row`.
    """
    seconds: dict[str, dict[str, list[float]]] = found["seconds"]
    present = [contender for contender in contenders if contender.label in seconds]
    rows = []
    for contender in present:
        # Peers run as their users would run them, unless all are compiled.
        rivals = [c for c in present if c.peer and c.name == contender.name]
        eager = [c for c in rivals if c.mode == "eager"]
        for clock, own in seconds[contender.label].items():
            exact = seconds[baseline][clock]
            times = {c.label: seconds[c.label][clock] for c in eager or rivals}
            peer = ""
            if times and not contender.peer:
                peer = min(times, key=lambda label: statistics.median(times[label]))
            rows.append(
                Row(
                    point=point,
                    contender=contender,
                    clock=clock,
                    size=size,
                    seconds=summarise(own),
                    vs_exact=ratios(exact, own),
                    peer=peer,
                    vs_peer=ratios(times[peer], own) if peer else None,
                    void=is_void(summarise(exact)),
                    params=found["params"][contender.label],
                    compile_seconds=found["compile_seconds"].get(contender.label),
                )
            )
    return rows


def growth(costs: Mapping[int, float]) -> float | None:
    """Exponent e of cost ~ N^e, fitted from `GROWTH_FROM` tokens up; None for a single length.

    Args:
        costs: Time or memory by number of tokens.
    """
    points = [(math.log(n), math.log(cost)) for n, cost in costs.items() if n >= GROWTH_FROM]
    if len(points) < 2:
        return None
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return slope


def crossover(faster: Mapping[int, float]) -> float | None:
    """From how many tokens on a contender is as fast as exact attention.

    Between two lengths, log ratio is taken to be straight over log N.

    Args:
        faster: How many times faster, by number of tokens.

    Returns:
        The shortest length measured if it is faster everywhere; None if it is slower at the
        longest.
    """
    start: float | None = None
    sizes = sorted(faster)
    for shorter, longer in zip([None, *sizes], sizes, strict=False):
        if faster[longer] < 1:
            start = None
        elif start is None and shorter is None:
            start = float(longer)
        elif start is None and shorter is not None:
            low, high = math.log(faster[shorter]), math.log(faster[longer])
            share = -low / (high - low)
            start = math.exp(math.log(shorter) + share * (math.log(longer) - math.log(shorter)))
    return start
