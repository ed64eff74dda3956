"""What a comparison of speed with timm's train.py found: ratios by case, and their table."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from tools.throughput_cases import EPOCHS

__all__ = ["OURS", "PEERS", "Measurement", "compare_case", "markdown"]

# The sides, as measurements name them.
OURS, PEERS = "ours", ("timm", "timm --no-prefetcher")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One process.

    Attributes:
        case: Name of the case.
        round: Counted from 1.
        side: ``ours``, or train.py with its options.
        images_per_s: Over all epochs but the first.
        data_wait_percent: Share of that time spent waiting for data.
        process_seconds: Of the whole process: imports, decoding, all epochs, files written.
        load_before: Processes that wanted a core before it started, on average over a minute.
    """

    case: str
    round: int
    side: str
    images_per_s: float
    data_wait_percent: float
    process_seconds: float
    load_before: float | None


def compare_case(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Ratios of our images per second to the faster setting of timm's.

    Args:
        measurements: Of one case. Rounds that lack a side are left out.

    Returns:
        ``peer`` (the setting with the higher median), ``ours`` and ``timm`` (median images per
        second, and share of the time spent waiting), ``ratios`` (within each round), their
        ``ratio_median``, ``ratio_min`` and ``ratio_max``.
    """
    sides = {OURS, *PEERS}
    rounds: dict[int, dict[str, Measurement]] = {}
    for entry in measurements:
        rounds.setdefault(entry.round, {})[entry.side] = entry
    whole = [entry for entry in rounds.values() if entry.keys() == sides]

    def median(side: str, field: str = "images_per_s") -> float:
        values: list[float] = [getattr(entry[side], field) for entry in whole]
        return round(statistics.median(values), 1)

    peer = max(PEERS, key=median)
    ratios = [round(e[OURS].images_per_s / e[peer].images_per_s, 3) for e in whole]
    return {
        "peer": peer,
        **{
            name: {
                "images_per_s": median(side),
                "data_wait_percent": median(side, "data_wait_percent"),
                "process_seconds": median(side, "process_seconds"),
            }
            for name, side in (("ours", OURS), ("timm", peer))
        },
        "ratios": ratios,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def markdown(result: dict[str, Any]) -> str:
    """The comparison as text, from what throughput.json holds."""
    hardware, versions = result["hardware"], result["versions"]
    loads = [e["load_before"] for e in result["measurements"] if e["load_before"] is not None]
    steps = ", ".join(f"{case['steps']} ({name})" for name, case in result["cases"].items())
    lines = [
        "# Images per second: timm-xformers train and timm's train.py",
        "",
        "| case | model | ours | timm | timm's setting | ratio | of rounds | wait for data % | "
        "process s |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |",
    ]
    for name, case in result["cases"].items():
        ours, timm = case["ours"], case["timm"]
        lines.append(
            f"| {name} | `{case['model']}` | {ours['images_per_s']:.0f} | "
            f"{timm['images_per_s']:.0f} | "
            f"{'default' if case['peer'] == PEERS[0] else '`--no-prefetcher`'} | "
            f"{case['ratio_median']:.2f} | {case['ratio_min']:.2f} to {case['ratio_max']:.2f} of "
            f"{len(case['ratios'])} | {ours['data_wait_percent']:.0f}, "
            f"{timm['data_wait_percent']:.0f} | {ours['process_seconds']:.0f}, "
            f"{timm['process_seconds']:.0f} |"
        )
    lines += ["", *(f"- **{name}**: {case['words']}" for name, case in result["cases"].items())]
    lines += [
        "",
        f"Medians over the rounds; the ratio is ours to timm's within a round. {EPOCHS} epochs of "
        f"{steps} "
        f"steps of {result['batch_size']} images from {result['data']}, the first left out; "
        "nothing is validated or saved in the time that is measured. Waiting for data and the "
        "seconds of the whole process, start, decoding and files included: ours, then timm's. "
        "train.py ran with and without its prefetcher; the faster one counts.",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores; for either side, threads: "
        f"{hardware['threads']}, workers: {result['workers']}; float32, "
        f"{', '.join(f'{key} {value}' for key, value in versions.items())}, commit "
        f"{result['commit']}, train.py {result['train_py_sha256'][:12]} (SHA-256), seed "
        f"{result['seed']}, {result['created']}.",
    ]
    if loads:
        lines += [
            "",
            f"Load of the machine before a run, which includes the one before it: {min(loads):.1f} "
            f"to {max(loads):.1f}.",
        ]
    return "\n".join(lines) + "\n"
