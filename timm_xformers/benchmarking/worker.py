"""The process that measures: a job as JSON on its input, results as lines of JSON on its output.

A process of its own, because the number of threads and the allocator's settings are read at its
start, and because the highest memory of a process cannot be told apart by what took it. Nothing of
the parent's is imported that is not measured.
"""

import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import torch
from timm.layers import set_fused_attn
from torch.profiler import ProfilerActivity

from timm_xformers.benchmarking.layers import build_contender
from timm_xformers.benchmarking.memory import memory_marks
from timm_xformers.benchmarking.peers import Unfit
from timm_xformers.benchmarking.settings import Contender, Point
from timm_xformers.benchmarking.steps import make_step
from timm_xformers.benchmarking.timing import (
    GpuStopwatch,
    HostStopwatch,
    Stopwatch,
    run_rounds,
    warm_up,
)
from timm_xformers.layers.performer.triton import choice
from timm_xformers.training.compiling import compile_model

__all__ = ["can_fork", "main", "measure_memory", "measure_time"]

MEMORY_STEPS = 3
FUSED_OPERATOR = "timm_xformers::performer"


def measure_time(
    point: Point, contenders: list[Contender], effort: dict[str, Any], watch: Stopwatch
) -> dict[str, Any]:
    """One point, with the effort of `benchmark.measure`.

    Returns:
        ``seconds`` (of every round, by label and clock), ``compile_seconds``, ``params`` and
        ``left_out`` (reasons), all by label.
    """
    steps, repeats, params = {}, {}, {}
    compiling: dict[str, float] = {}
    left_out: dict[str, str] = {}
    # Each point is compiled for itself, and layers with a common base class share the compiler's
    # count of versions, beyond which it would go on uncompiled without a word.
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 256
    for contender in contenders:
        label = contender.label
        try:
            step, params[label] = _prepare(contender, point, effort["seed"])
            repeats[label], extra = warm_up(step, watch, effort["min_ms"] / 1e3)
        except Exception as error:  # whatever another package, or a compiler, comes up with
            left_out[label] = _reason(error)
            continue
        steps[label] = step
        if contender.mode == "compiled":
            compiling[label] = round(extra, 2)
    seconds = run_rounds(
        steps,
        repeats,
        watch,
        rounds=effort["rounds"],
        limit_seconds=effort["limit_seconds"],
        seed=effort["seed"],
    )
    return {
        "seconds": seconds,
        "compile_seconds": compiling,
        "params": {label: params[label] for label in steps},
        "left_out": left_out,
    }


def measure_memory(point: Point, contender: Contender, seed: int) -> dict[str, Any]:
    """Peak of some steps over what the process held before the first one.

    Returns:
        ``peak_mib``, or ``left_out`` with the reason.
    """
    try:
        step, _ = _prepare(contender, point, seed)
        before, peak = memory_marks(point.device)
        for _ in range(MEMORY_STEPS):
            step()
        return {"peak_mib": round((peak() - before) / 2**20, 1)}
    except Exception as error:
        return {"left_out": _reason(error)}


def can_fork(device: str) -> bool:
    """Whether copies of a process may measure memory; a GPU and macOS need fresh ones."""
    return device == "cpu" and sys.platform == "linux"


def _prepare(contender: Contender, point: Point, seed: int) -> tuple[Callable[[], None], int]:
    module, x = build_contender(contender, point, seed)
    module.train(point.task != "forward")
    parameters = list(module.parameters())
    called: Callable[[torch.Tensor], torch.Tensor] = module
    if contender.mode == "compiled":
        called = compile_model(module, dynamic=False)
    called = functools.partial(_call, called, contender.mode == "fused")
    if contender.mode == "fused":
        with torch.no_grad(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
            called(x)
        if not any(event.key == FUSED_OPERATOR for event in profile.key_averages()):
            raise Unfit("the kernels do not take this shape or type")
    return make_step(called, parameters, x, point), sum(p.numel() for p in parameters)


def _call(
    called: Callable[[torch.Tensor], torch.Tensor], fused: bool, x: torch.Tensor
) -> torch.Tensor:
    """With our kernels or without, whatever the layers themselves would choose."""
    choice.MIN_TOKENS = 1 if fused else sys.maxsize
    set_fused_attn(True, experimental=fused)
    return called(x)


def _reason(error: Exception) -> str:
    if isinstance(error, Unfit):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".rstrip(": .")


def main() -> None:
    """Do the job on standard input."""
    # Packages that print must not print between our lines.
    results: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of packages about packages
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    device, seed = job["device"], job["effort"]["seed"]
    for entry in job["work"]:
        point = Point(**entry["point"])
        contenders = [Contender(**values) for values in entry["contenders"]]
        if job["kind"] == "time":
            watch = GpuStopwatch() if device == "cuda" else HostStopwatch(job["threads"])
            found = measure_time(point, contenders, job["effort"], watch)
        elif can_fork(device):
            found = _in_fork(functools.partial(measure_memory, point, contenders[0], seed))
        else:
            found = measure_memory(point, contenders[0], seed)
        print(json.dumps({"point": dataclasses.asdict(point), **found}), file=results, flush=True)


def _in_fork(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure in a copy of this process, which has imported everything and computed nothing."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(measure()))
            code = 0
        finally:
            os._exit(code)  # whatever happens: the parent's further work is not ours
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(process, 0)
    if status or not answer:
        code = os.waitstatus_to_exitcode(status)
        return {"left_out": f"its process ended with code {code}; -9 means that memory ran out"}
    found: dict[str, Any] = json.loads(answer)
    return found


if __name__ == "__main__":
    main()
