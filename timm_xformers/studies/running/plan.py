"""What a study will take: a few measured steps of every arm, multiplied."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from timm_xformers.data.data import Data, open_data
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.files.tables import text_table
from timm_xformers.planning.dryrun import estimate
from timm_xformers.studies.running.definition import PlannedRun, Study
from timm_xformers.studies.running.folder import StudyFolder
from timm_xformers.training.session import open_session

__all__ = ["hours_left", "measure_plan", "plan_key", "plan_table", "read_plan"]


def plan_key(run: PlannedRun, threads: int) -> str:
    """Under which name `read_plan` has a run; its seed costs nothing."""
    return f"{run.arm}/{run.data}/{run.recipe.digest}/{threads}"


def read_plan(folder: StudyFolder) -> dict[str, dict[str, Any]]:
    """What was measured so far: ``params``, ``steps``, ``step_ms``, ``seconds``, ``cpu_seconds``.

    Or ``refused``, why an arm cannot be trained.
    """
    try:
        found: dict[str, dict[str, Any]] = json.loads(folder.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def measure_plan(
    study: Study, root: Path, data_dirs: Mapping[str, str | None], threads: int
) -> None:
    """Measure every arm on every data set that is not measured yet; each is written at once."""
    folder = StudyFolder(root)
    opened: dict[str, Data] = {}
    for run in _one_seed(study):
        plan = read_plan(folder)
        key = plan_key(run, threads)
        # What was refused may have been mended.
        if key in plan and "refused" not in plan[key]:
            continue
        recipe = dataclasses.replace(run.recipe, data_dir=data_dirs.get(run.data))
        try:
            if run.data not in opened:
                opened[run.data] = open_data(recipe)
            # Precision is a setting of the process in accelerate.
            AcceleratorState._reset_state(reset_partial_state=True)
            session = open_session(recipe, opened[run.data])
            cost = estimate(session)
            plan[key] = {
                "params": session.num_params,
                "steps": cost.steps,
                "step_ms": round(1e3 * cost.stages[-1].step[1], 2),
                "seconds": round(cost.seconds, 1),
                "cpu_seconds": round(cost.cpu_seconds, 1),
            }
        except UserError as error:
            plan[key] = {"refused": str(error)}
        write_text(folder.plan, json.dumps(plan, indent=1) + "\n")


def hours_left(
    study: Study,
    plan: Mapping[str, Mapping[str, Any]],
    done: Collection[tuple[str, int]],
    threads: int,
) -> float:
    """Core-hours of the runs that are not finished and can be trained."""
    entries = [plan.get(plan_key(run, threads), {}) for run in study.runs if run.key not in done]
    return sum(float(entry.get("cpu_seconds", 0)) for entry in entries) / 3600


def plan_table(
    study: Study,
    plan: Mapping[str, Mapping[str, Any]],
    done: Collection[tuple[str, int]],
    threads: int,
) -> str:
    """A row for each arm on each data set, for a terminal, and what the whole will take."""
    rows = []
    for first in _one_seed(study):
        entry = plan.get(plan_key(first, threads), {})
        mine = [run for run in study.runs if (run.arm, run.data) == (first.arm, first.data)]
        left = sum(run.key not in done for run in mine)
        cells: list[Any] = [first.arm, first.data]
        if "refused" in entry:
            cells += ["cannot be trained", "", "", "", left]
        else:
            hours = entry.get("cpu_seconds", 0.0) / 3600
            cells += [f"{entry.get('params', 0):,}", entry.get("steps", ""), entry.get("step_ms")]
            cells += [f"{hours:.3f}", left]
        rows.append(cells)
    heads = ("arm", "data", "parameters", "steps", "ms a step", "core-hours a run", "runs left")
    total = hours_left(study, plan, done, threads)
    runs = sum(run.key not in done for run in study.runs)
    lines = [text_table(heads, rows), ""]
    lines += [
        f"{run.arm} on {run.data} cannot be trained: {plan[plan_key(run, threads)]['refused']}"
        for run in _one_seed(study)
        if "refused" in plan.get(plan_key(run, threads), {})
    ]
    lines.append(
        f"{runs} of {len(study.runs)} runs are left, about {total:.2f} core-hours with "
        f"{threads} thread{'s' if threads > 1 else ''} a run, without starting and testing."
    )
    return "\n".join(lines)


def _one_seed(study: Study) -> list[PlannedRun]:
    """The first run of every arm on every data set."""
    first: dict[tuple[str, str], PlannedRun] = {}
    for run in study.runs:
        first.setdefault((run.arm, run.data), run)
    return list(first.values())
