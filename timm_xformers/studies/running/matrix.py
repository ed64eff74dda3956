"""The runs of a study, each in a process of its own, several at once.

A run belongs to whoever holds its lock. Its process ends with the one that started it, after saving
where it stands, so that after any crash the same call goes on.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from timm_xformers.errors import UsageError, UserError
from timm_xformers.records.results_json import Record
from timm_xformers.studies.running.definition import PlannedRun, Study
from timm_xformers.studies.running.folder import StudyFolder
from timm_xformers.studies.running.plan import (
    hours_left,
    measure_plan,
    plan_key,
    plan_table,
    read_plan,
)
from timm_xformers.studies.whole_run import train_whole
from timm_xformers.training.signals import Stopped, StopRequest

__all__ = ["plan_study", "run_study"]

# Between two looks at the processes and at what others have finished.
POLL_SECONDS = 0.5


def plan_study(
    study: Study, root: Path, data_dirs: Mapping[str, str | None], threads: int
) -> dict[str, dict[str, Any]]:
    """Measure what the arms take, as far as that is not known, and say it.

    Returns:
        See `read_plan`.

    Raises:
        UserError: The records do not fit the file, or the measurement broke down.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("study trains in one process per run; use --workers, and no launcher.")
    folder = StudyFolder(root)
    done, others = folder.finished(study)
    folder.create()
    for words in others:
        folder.say(f"left out: {words}")
    with folder.claim("plan", wait=True):
        plan = read_plan(folder)
        left = [run for run in study.runs if run.key not in done]
        if any("params" not in plan.get(plan_key(run, threads), {}) for run in left):
            folder.say("measuring a few steps of every arm")
            said = folder.said("plan")
            process = _start(said, threads, measure_plan, study, root, dict(data_dirs), threads)
            try:
                process.join()
            finally:
                process.kill()
            if process.exitcode:
                raise UserError(
                    f"Measuring the arms ended early: {_last_line(said, process.exitcode)} (all "
                    f"of it is in {said})."
                )
            plan = read_plan(folder)
    print(plan_table(study, plan, done, threads), file=sys.stderr, flush=True)
    return plan


def run_study(
    study: Study,
    root: Path,
    data_dirs: Mapping[str, str | None],
    *,
    workers: int = 1,
    threads: int = 1,
) -> dict[str, str]:
    """Train every run that has no record, until all have one.

    The same call on the same folder goes on where an earlier one ended, or helps one that is still
    at work.

    Args:
        study: What is trained.
        root: The folder.
        data_dirs: Where each data set lies.
        workers: Runs at once, here.
        threads: Of each.

    Returns:
        Why runs failed, by name; they are tried again by the next call.

    Raises:
        Stopped: A signal came; all runs have saved where they stand.
        UserError: Something the user can repair. What is finished is kept.
    """
    plan = plan_study(study, root, data_dirs, threads)
    folder = StudyFolder(root)
    done = set(folder.finished(study)[0])
    failed: dict[str, str] = {}
    for run in study.runs:
        refused = plan.get(plan_key(run, threads), {}).get("refused")
        if refused and run.key not in done:
            failed[run.name] = refused
    jobs: list[_Job] = []
    with StopRequest() as request, contextlib.ExitStack() as cleanup:
        cleanup.callback(_end_all, jobs)
        while True:
            for run in study.runs:
                if len(jobs) >= workers or request.signum:
                    break
                if run.key in done or run.name in failed:
                    continue
                job = _claim(run, folder, data_dirs, threads)
                if job is not None:
                    folder.say(f"{run.name}: training")
                    jobs.append(job)
                elif folder.record(run).record.is_file():
                    done.add(run.key)
            if not jobs and (len(done) + len(failed) >= len(study.runs) or request.signum):
                break
            sentinels = [job.process.sentinel for job in jobs]
            if sentinels:
                connection.wait(sentinels, POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)  # the rest is in other hands
            for job in list(jobs):
                job.forward()
                if request.signum:
                    job.process.terminate()
                if job.process.is_alive():
                    continue
                jobs.remove(job)
                job.end()
                if folder.keep(job.run):
                    done.add(job.run.key)
                    left = hours_left(study, plan, done, threads)
                    folder.say(
                        f"{job.run.name}: {_outcome(folder.record(job.run).record)}; "
                        f"{len(done)} of {len(study.runs)} runs are finished, about {left:.2f} "
                        "core-hours are left"
                    )
                elif not request.signum:
                    reason = _last_line(folder.said(job.run.name), job.process.exitcode)
                    failed[job.run.name] = reason
                    folder.say(f"{job.run.name}: FAILED, the others go on: {reason}")
    if request.signum:
        raise Stopped("Stopped; the same command goes on.", request.signum)
    return failed


@dataclasses.dataclass
class _Job:
    """A run at work: its process, what releases its lock, and how much of its output was shown."""

    run: PlannedRun
    process: Any
    release: Callable[[], None]
    said: Path
    shown: int

    def forward(self) -> None:
        """Show what the process said since the last time, line by line."""
        with self.said.open("rb") as file:
            file.seek(self.shown)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.shown += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            print(f"{self.run.name}: {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Let the process save and end, then free the run."""
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        self.forward()
        self.release()


def _end_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.process.terminate()  # all at once: saving takes its time
    for job in jobs:
        job.end()


def _claim(
    run: PlannedRun, folder: StudyFolder, data_dirs: Mapping[str, str | None], threads: int
) -> _Job | None:
    """Start a run, unless it is finished or in other hands."""
    stack = contextlib.ExitStack()
    if not stack.enter_context(folder.claim(run.name)) or folder.keep(run):
        stack.close()
        return None
    recipe = dataclasses.replace(run.recipe, data_dir=data_dirs.get(run.data))
    said = folder.said(run.name)
    shown = said.stat().st_size if said.is_file() else 0
    planned = dataclasses.replace(run, recipe=recipe)
    process = _start(said, threads, _train, planned, folder.root)
    return _Job(run, process, stack.close, said, shown)


def _train(run: PlannedRun, root: Path) -> None:
    folder = StudyFolder(root)
    # A process whose parent was killed may still be saving.
    with folder.claim(f"{run.name}.process", wait=True):
        train_whole(run.recipe, folder.run(run).root)


def _start(said: Path, threads: int, work: Callable[..., None], *args: Any) -> Any:
    """Let a fresh process do something, and write what it says to a file."""
    process = multiprocessing.get_context("spawn").Process(
        target=_in_process, args=(said, threads, work, args)
    )
    said.touch()
    process.start()
    return process


def _in_process(said: Path, threads: int, work: Callable[..., None], args: Any) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        work(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stop:
        sys.exit(stop.exit_code)


def _end_with_parent() -> None:
    """Stop as a signal does when the process that started this one is gone: save, then end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _outcome(path: Path) -> str:
    record = Record.load(path)
    metric, percent = "test", record.test_top1_percent
    if percent is None:
        metric, percent = "validation", record.val_top1_percent
    shown = "" if percent is None else f"{metric} top-1 {percent:.2f} %, "
    return f"{shown}{record.cpu_seconds or record.seconds:,.0f} processor seconds"


def _last_line(said: Path, code: int) -> str:
    """Why a process ended."""
    if code < 0:
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"killed by signal {-code}{hint}"
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    words = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return words.removeprefix("error: ")
