"""Choosing a recipe by validation: every configuration on every fold, then the best on everything.

The test set is read once, by the final training of the best configuration.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from timm_xformers.errors import UsageError, UserError, require_extra
from timm_xformers.recipe import Recipe, override
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import plain_name
from timm_xformers.studies.selecting.folds import FoldResult, Folds, open_fold, open_folds
from timm_xformers.studies.selecting.ranking import (
    Summary,
    best_of,
    plot_selection,
    summarize,
    write_folds,
    write_markdown,
)
from timm_xformers.studies.selecting.search import Search
from timm_xformers.studies.selecting.space import Space
from timm_xformers.studies.selecting.trials import tried, work_on_trials
from timm_xformers.studies.shared_folder import POLL_SECONDS, threads_for
from timm_xformers.studies.whole_run import train_whole

__all__ = ["select"]


def select(
    recipe: Recipe, space: Space, *, workers: int = 1, final: bool = True
) -> tuple[Search, Summary]:
    """Try what the space holds, choose, and train the best on all training images.

    The same call on the same folder goes on where an earlier one ended, or helps one that is still
    at work.

    Args:
        recipe: What all configurations share; ``output`` names the folder.
        space: What they may set.
        workers: Processes here that share the work and the cores.
        final: Train the best configuration again, on everything, and test it.

    Returns:
        The folder and the best configuration.

    Raises:
        UserError: Something the user can repair. What is finished is kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("select trains in one process per fold; use --workers, and no launcher.")
    if space.search:
        require_extra("search", "optuna")
    root = Path(recipe.output or f"runs/select-{plain_name(recipe.model, recipe.data)}")
    search = Search(dataclasses.replace(recipe, output=None), space, root)
    folds = open_folds(search.recipe, space.folds)
    search.create(folds, lambda: _check(search, folds))
    if workers > 1:
        _share(search, workers)
    else:
        _work(search)
    with search.claim("final", wait=True):
        summaries = _summaries(search)
        best = best_of(summaries)
        write_folds(search.csv, summaries, space.keys)
        if best is None:
            reasons = [r.reason for s in summaries for r in s.results if r.reason]
            raise UserError(
                f"No configuration finished all folds; {search.csv} lists them"
                + (f", and the first said: {reasons[0]}" if reasons else ".")
            )
        chosen = dataclasses.replace(override(recipe, best.values), val_fraction=0.0, output=None)
        chosen.save(search.best)
        plot_selection(search.plot, recipe, summaries, best)
        write_markdown(search.markdown, recipe, summaries, best, None)
        if final:
            record = _train_final(search, chosen)
            write_markdown(search.markdown, recipe, summaries, best, record)
    return search, best


def _check(search: Search, folds: Folds) -> None:
    """Build every configuration of a grid, or the recipe of a search, before the first is trained.

    A search may draw combinations that do not fit; they count as failed trials.
    """
    for number, values in enumerate(search.space.configurations() or [{}], start=1):
        try:
            open_fold(search.recipe, values, folds, 1)
        except UserError as error:
            if not values:
                raise
            words = ", ".join(f"{key}={value!r}" for key, value in values.items())
            raise type(error)(f"Configuration {number} ({words}): {error}") from error


def _work(search: Search) -> None:
    """Do what nobody else does, until everything is done."""
    folds = open_folds(search.recipe, search.space.folds, decoded=True)
    if search.space.search:
        work_on_trials(search, folds)
    else:
        _work_on_grid(search, folds)


def _work_on_grid(search: Search, folds: Folds) -> None:
    configurations = search.space.configurations()
    tasks = [
        (number, values, fold)
        for number, values in enumerate(configurations, start=1)
        for fold in range(1, search.space.folds + 1)
    ]
    while tasks:
        for number, values, fold in tasks:
            path = search.result_path(values, fold)
            with search.claim(path.stem) as ours:
                if ours and not path.exists():
                    name = f"configuration {number}/{len(configurations)}"
                    search.run(name, values, folds, fold)
        tasks = [task for task in tasks if not search.result_path(*task[1:]).exists()]
        if tasks:
            time.sleep(POLL_SECONDS)


def _share(search: Search, workers: int) -> None:
    """Let processes do the work, each with its share of the cores.

    Raises:
        UserError: One of them met something the user can repair, or all of them were killed.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    threads = threads_for(workers)
    running = [
        context.Process(target=_worker, args=(search, threads, answers)) for _ in range(workers)
    ]
    try:
        for process in running:
            process.start()
        pending = {process.sentinel: process for process in running}
        while pending:
            for sentinel in connection.wait(list(pending)):
                del pending[sentinel]  # type: ignore[arg-type]
            if not answers.empty():
                raise answers.get()
        # The others take over what a killed one leaves.
        if all(process.exitcode for process in running):
            raise UserError(
                f"All workers ended early (exit codes {[p.exitcode for p in running]}), as when "
                "memory runs out; start the same command again, with fewer --workers."
            )
    finally:
        for process in running:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()


def _worker(search: Search, threads: int, answers: Any) -> None:
    torch.set_num_threads(threads)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the parent says so
            _work(search)
    except UserError as error:
        answers.put(type(error)(str(error)))
        raise SystemExit(error.exit_code) from None


def _summaries(search: Search) -> list[Summary]:
    configurations = tried(search) if search.space.search else search.space.configurations()
    results: list[list[FoldResult]] = [search.results(values) for values in configurations]
    return summarize(configurations, results, search.space.folds)


def _train_final(search: Search, chosen: Recipe) -> Record:
    """Train on everything and test once; go on with a training that was interrupted."""
    if not (search.final / "results.json").is_file():
        search.say(f"training the best configuration on all training images, into {search.final}")
    return train_whole(chosen, search.final)
