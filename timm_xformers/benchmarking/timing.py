"""Rounds of shuffled contenders, by clocks that fit the device.

A round calls every contender once, as often in a row as fills some milliseconds, so that what
disturbs the machine disturbs neighbours in time alike. Only values of one round are divided.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

__all__ = ["GpuStopwatch", "HostStopwatch", "Stopwatch", "run_rounds", "warm_up"]

FEWEST_ROUNDS = 3


class Stopwatch(Protocol):
    """Seconds of a call, by one or several clocks."""

    def measure(self, step: Callable[[], None], repeats: int) -> dict[str, float]:
        """Call ``step`` so often; seconds per call, by name of the clock."""


class HostStopwatch:
    """Wall clock, and processor time of the process if it has one thread.

    The latter stays steady when neighbours use the cores. With several threads it counts those that
    wait at a barrier, which says nothing.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def measure(self, step: Callable[[], None], repeats: int) -> dict[str, float]:
        """See `Stopwatch`."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        clocks = {"cpu": cpu} if self.threads == 1 else {}
        return {name: seconds / repeats for name, seconds in (clocks | {"wall": wall}).items()}


class GpuStopwatch:
    """The device's own time between two events, and wall clock from an idle device to an idle one.

    The former leaves out what the host needs before the first kernel, the latter holds it.
    """

    def measure(self, step: Callable[[], None], repeats: int) -> dict[str, float]:
        """See `Stopwatch`."""
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        first.record()
        for _ in range(repeats):
            step()
        last.record()
        torch.cuda.synchronize()
        wall = time.perf_counter() - wall
        seconds = first.elapsed_time(last) / 1e3
        return {"gpu": seconds / repeats, "wall": wall / repeats}


def warm_up(step: Callable[[], None], watch: Stopwatch, min_seconds: float) -> tuple[int, float]:
    """Call a contender twice, by the wall clock.

    Returns:
        Calls that fill ``min_seconds``, judged by the second one, and by how many seconds the first
        took longer than the second.
    """
    cold = watch.measure(step, 1)["wall"]
    warm = watch.measure(step, 1)["wall"]
    return max(1, math.ceil(min_seconds / max(warm, 1e-9))), max(0.0, cold - warm)


def run_rounds(
    steps: Mapping[str, Callable[[], None]],
    repeats: Mapping[str, int],
    watch: Stopwatch,
    *,
    rounds: int,
    limit_seconds: float,
    seed: int,
) -> dict[str, dict[str, list[float]]]:
    """Measure warm contenders, each called ``repeats`` times in a round.

    No round begins after ``limit_seconds``, once there are `FEWEST_ROUNDS`.

    Returns:
        Seconds per call of every round, by contender, then by clock.
    """
    order = random.Random(seed)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - start > limit_seconds:
            break
        for name in order.sample(list(steps), len(steps)):
            for clock, seconds in watch.measure(steps[name], repeats[name]).items():
                found[name].setdefault(clock, []).append(seconds)
    return found
