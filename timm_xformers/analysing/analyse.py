"""An analysis from its settings to its folder."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_xformers.analysing.losses import Assignment, Loss, Losses
from timm_xformers.analysing.report import ORIGINAL, markdown, plot, tables, write_tables
from timm_xformers.analysing.search import Budget, Costs, Proposal, mapping_of, propose
from timm_xformers.benchmarking.benchmark import Benchmark
from timm_xformers.benchmarking.compare import Row, main_clock
from timm_xformers.benchmarking.settings import Settings
from timm_xformers.data.data import make_batches
from timm_xformers.data.sampling import eval_batches
from timm_xformers.data.subset import limit_images
from timm_xformers.errors import UsageError
from timm_xformers.files.atomic import write_text
from timm_xformers.layers.factory import attention_class
from timm_xformers.predicting.evaluate import open_published
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import origin, wilson_interval

__all__ = ["Analysis", "analyse"]

PROPOSAL = "proposal"
# Searches, each for more than the budget by what the one before missed when it was measured.
SEARCHES = 3


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What to analyse.

    Attributes:
        recipe: Names model and data; ``batch_size`` is of the losses, ``seed`` of features and
            images.
        output: Folder to create.
        mechanisms: Names to try.
        budget: What to propose for; None: nothing is proposed.
        split: Whose images: ``val`` or ``train``, never ``test``, which nothing may be chosen by.
        images: At most so many of them, the same share of every class.
        img_sizes: Sides of the inputs that are timed; empty: the model's own.
        time_batch: Images of a timed pass.
        threads: Of the process that measures time.
        dtype: Of timed passes, by autocast.
        rounds: Of timed passes.
        limit_seconds: A size ends after so long, but not before three rounds.
        most_exact: Blocks that a proposal may keep.
    """

    recipe: Recipe
    output: Path
    mechanisms: tuple[str, ...]
    budget: Budget | None = None
    split: str = "val"
    images: int = 256
    img_sizes: tuple[int, ...] = ()
    time_batch: int = 1
    threads: int = 1
    dtype: str = "float32"
    rounds: int = 7
    limit_seconds: float = 120.0
    most_exact: int = 4


def analyse(analysis: Analysis) -> str:
    """Measure, propose, and write analysis.json, .md, two .csv and .png.

    Returns:
        The tables for a terminal.

    Raises:
        UserError: Something the user can repair.
    """
    try:
        for name in analysis.mechanisms:
            attention_class(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    output = analysis.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is there already; choose another --output.")
    recipe = analysis.recipe
    if recipe.model_kwargs:
        raise UsageError(
            "model_kwargs would change the model whose losses are measured, not the one that is "
            "timed; write the changed model to a folder, and analyse that."
        )
    torch.set_num_threads(analysis.threads)
    model, data, preprocessing = open_published(recipe, analysis.split)
    if data.multi_label:
        raise UsageError(
            f"{recipe.model} gives an image several classes, and analyse compares models of one, "
            "by softmax; choose another."
        )
    for note in data.notes:
        _say(note)
    images = limit_images(data.split(analysis.split), analysis.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    batches = make_batches(
        images, recipe, preprocessing, in_memory=data.in_memory, training=False, device=device
    )
    _say(f"losses on {len(images)} {analysis.split} images of {recipe.data}")
    order = eval_batches(len(batches), recipe.batch_size, rank=0, world_size=1)
    losses = Losses(model, analysis.mechanisms, list(batches.batches(order)), recipe.seed)
    errors = losses.output_errors()
    original = losses.of({})
    whole: dict[str, Assignment] = {
        name: dict.fromkeys(losses.blocks, name) for name in analysis.mechanisms
    }
    result: dict[str, Any] = {
        **origin(device),
        "model": recipe.model,
        "data": recipe.data,
        "split": analysis.split,
        "images": len(images),
        "feature_images": losses.feature_images,
        "img_size": preprocessing.img_size,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "time": {
            "batch_size": analysis.time_batch,
            "threads": analysis.threads,
            "dtype": analysis.dtype,
            "img_sizes": sorted(analysis.img_sizes or [preprocessing.img_size]),
        },
        "kept": {str(s.index): s.refused for s in losses.sites if s.refused is not None},
        "whole": [_entry(ORIGINAL, original)]
        + [_entry(name, losses.of(assignment)) for name, assignment in whole.items()],
        "blocks": [
            {
                "block": number,
                "name": losses.sites[number].name,
                "mechanism": name,
                "output_error": errors[number][name],
                **_entry(name, losses.of({number: name})),
            }
            for number in losses.blocks
            for name in analysis.mechanisms
        ],
        "speed": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    _say(f"time and memory at {', '.join(map(str, result['time']['img_sizes']))} pixels")
    rows = _measure(analysis, "speed", result, whole)
    result["speed"] = [_figures(row) for row in rows]
    if analysis.budget is not None:
        _propose(analysis, analysis.budget, losses, rows, result)
    write_text(output / "analysis.json", json.dumps(result, indent=1) + "\n")
    write_tables(output, result)
    write_text(output / "analysis.md", markdown(result))
    plot(output / "analysis.png", result)
    return tables(result)


def _entry(name: str, loss: Loss) -> dict[str, Any]:
    share, right = (
        None if count is None else [round(100 * e, 2) for e in wilson_interval(count, loss.images)]
        for count in (loss.agreement, loss.right)
    )
    return {
        "mechanism": name,
        "feature_error": loss.feature_error,
        "kl_nats": loss.kl,
        "agreement_percent": loss.agreement_percent,
        "agreement_interval_percent": share,
        "top1_percent": loss.top1_percent,
        "top1_interval_percent": right,
    }


def _measure(
    analysis: Analysis, folder: str, result: dict[str, Any], models: dict[str, Assignment]
) -> list[Row]:
    """Time and memory of the model as it is and of others, in pairs."""
    seed = analysis.recipe.seed
    settings = Settings(
        output=analysis.output / folder,
        models=(analysis.recipe.model,),
        replacements=tuple(
            (title, json.dumps({"mechanism": mapping_of(assignment), "feature_seed": seed}))
            for title, assignment in models.items()
            if assignment
        ),
        peers=False,
        img_sizes=tuple(result["time"]["img_sizes"]),
        batch_size=analysis.time_batch,
        passes=("forward",),
        dtypes=(analysis.dtype,),
        threads=(analysis.threads,),
        rounds=analysis.rounds,
        limit_seconds=analysis.limit_seconds,
        seed=seed,
    )
    benchmark = Benchmark(settings)
    benchmark.run()
    return [row for row in benchmark.rows if row.clock == main_clock(row.point)]


def _figures(row: Row) -> dict[str, Any]:
    return {
        "mechanism": row.contender.title or ORIGINAL,
        "img_size": row.point.size,
        "clock": row.clock,
        "ms": 1e3 * row.seconds.median,
        "times_as_fast": row.vs_exact.median,
        "times_as_fast_quartiles": [row.vs_exact.q1, row.vs_exact.q3],
        "rounds": row.vs_exact.count,
        "void": row.void,
        "peak_mib": row.peak_mib,
    }


def _propose(
    analysis: Analysis, budget: Budget, losses: Losses, rows: list[Row], result: dict[str, Any]
) -> None:
    """Search, measure what came out, and search for more where that falls short."""
    largest = max(row.point.size for row in rows)
    found: dict[str, float] = {}
    for row in rows:
        value = row.seconds.median if budget.kind == "time" else row.peak_mib
        if row.point.size == largest and value is not None:
            found[row.contender.title or ORIGINAL] = value
    names = [name for name in analysis.mechanisms if name in found]
    if ORIGINAL not in found or not names:
        raise UsageError(
            f"No figure of {budget.kind} was measured at {largest} pixels, so --budget {budget} "
            f"cannot be judged; see {analysis.output / 'speed' / 'benchmark.md'}."
        )
    if budget.kind == "time":  # of ratios within rounds, which the neighbours of a machine spare
        ratio = {r.contender.title: r.vs_exact.median for r in rows if r.point.size == largest}
        found = {name: found[ORIGINAL] / ratio.get(name, 1.0) for name in found}
    costs = Costs(
        budget.kind, found[ORIGINAL], {name: found[name] for name in names}, len(losses.blocks)
    )
    factor = budget.factor
    for turn in range(1, SEARCHES + 1):
        _say(f"search {turn}: {budget.kind}, {factor:.3g} times")
        best = propose(losses, costs, factor, analysis.most_exact)
        measured = _measure(
            analysis, f"speed-{PROPOSAL}-{turn}", result, {PROPOSAL: best.assignment}
        )
        gain = _gain(measured, budget.kind, largest)
        met = gain is not None and gain >= budget.factor
        if met or not best.met or gain is None:
            break
        factor *= 1.02 * budget.factor / gain
    speed = [_figures(row) for row in measured if row.contender.title]
    result["proposal"] = {
        "budget": str(budget),
        "met": met,
        "img_size": largest,
        "expected_gain": best.gain,
        "measured_gain": gain,
        "blocks": mapping_of(best.assignment),
        "sets_tried": len(losses.known),
        **_entry(PROPOSAL, losses.of(best.assignment)),
        "speed": speed,
        "command": _command(analysis, best),
    }


def _gain(rows: list[Row], kind: str, largest: int) -> float | None:
    mine = {row.contender.title: row for row in rows if row.point.size == largest}
    if PROPOSAL not in mine:
        return None
    if kind == "time":
        return mine[PROPOSAL].vs_exact.median
    before, after = mine[""].peak_mib, mine[PROPOSAL].peak_mib
    return before / after if before and after else None


def _command(analysis: Analysis, proposal: Proposal) -> str:
    recipe = analysis.recipe
    words = ["timm-xformers", "retrofit", recipe.model, "--mechanism"]
    words += [json.dumps(mapping_of(proposal.assignment)), "--data", recipe.data]
    for flag in ("data_dir", "labels"):
        if (value := getattr(recipe, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", value]
    return shlex.join(words)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
