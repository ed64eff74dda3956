"""The tables of results, from records: every row, and the best of each data set.

A row of one run whose weights are in the package has the figure of these weights, rounded and as
they load, since that is what a reader can measure again; every other row that of its runs.
Words that no record has, what mixes the tokens and which published figure to compare with, stand in
notes.yaml beside the records. The command of a row is found, not written: a shipped recipe whose
hash is the record's, or the recipe that was stored with the weights.
"""

import functools
import re
import statistics
from collections.abc import Sequence
from typing import Any

from timm_xformers.errors import UserError
from timm_xformers.files.tables import markdown_table
from timm_xformers.recipe import load_recipe, shipped_recipes
from timm_xformers.records.results_json import Record
from timm_xformers.weights import read_manifest
from tools.checkout import Checkout

__all__ = ["best_table", "results_table", "source_sentence"]

HEADINGS = (
    *("model", "data, what mixes", "parameters", "command", "seconds of training"),
    *("test top-1 %", "seeds", "published", "its budget"),
)
BEST = ("data, what mixes", "model", "parameters", *HEADINGS[5:])
DATA_ORDER = ("digits", "mnist", "cifar10", "cifar100")
# What makers add to a processor's name.
NOISE = re.compile(r"\((?:R|TM)\)| (?:Processor|CPU)\b.*| \d+-Core.*")


def results_table(checkout: Checkout) -> str:
    """Rows of runs that differ in seed only, by data set and in the order of the records."""
    rows = [row for rows in _rows(checkout).values() for row in rows]
    return "\n".join(markdown_table(HEADINGS, rows, "l")) + "\n"


def best_table(checkout: Checkout) -> str:
    """Of each data set the row with the highest accuracy, in fewer columns."""
    at = HEADINGS.index("test top-1 %")
    every = _rows(checkout).values()
    best = [max(rows, key=lambda row: float(row[at].split()[0])) for rows in every]
    rows = [[row[HEADINGS.index(head)] for head in BEST] for row in best]
    return "\n".join(markdown_table(BEST, rows, "l")) + "\n"


def _rows(checkout: Checkout) -> dict[str, list[tuple[str, ...]]]:
    """Cells of `HEADINGS` by data set."""
    notes = checkout.load_notes()
    cards = {
        (entry.model, entry.tag, entry.recipe_hash): entry.card
        for entry in read_manifest(checkout.weights).values()
    }
    rows: dict[str, list[tuple[str, ...]]] = {}
    by_data = checkout.training_records()
    for data in sorted(by_data, key=lambda name: (*DATA_ORDER, name).index(name)):
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in by_data[data]:
            groups.setdefault((record.model, str(record.recipe_hash)), []).append(record)
        for (model, recipe_hash), runs in groups.items():
            card = cards.get((model, data, recipe_hash))
            rows.setdefault(data, []).append(_row(data, runs, card, notes, checkout))
    return rows


def source_sentence(notes: dict[str, Any], model: str, data: str) -> str:
    """A published figure to compare with; empty if nobody published one."""
    found, budget = _published(notes, model, data)
    return f"Published for such a model on {data}: {found}; {budget}." if found != "-" else ""


def _row(
    data: str,
    runs: Sequence[Record],
    card: str | None,
    notes: dict[str, Any],
    checkout: Checkout,
) -> tuple[str, ...]:
    first = runs[0]
    link = f" ([weights](../model_cards/{card}.md))" if card else ""
    recipe_hash = str(first.recipe_hash)
    mixes = notes["mixes"].get(recipe_hash) or notes["mixes"].get(first.model)
    if mixes is None:
        raise UserError(
            f"{checkout.notes} says nothing of what mixes in {first.model}; add a line there."
        )
    loaded = [checkout.load_float16_record(card)] if card and len(runs) == 1 else runs
    tested = [run.test_top1_percent for run in loaded if run.test_top1_percent is not None]
    figure = f"{statistics.mean(tested):.2f}"
    if len(tested) > 1:
        figure += f" ± {statistics.stdev(tested):.2f}"
    return (
        f"`{first.model}`",
        f"{data}: {mixes}{link}",
        f"{first.params:,}",
        f"`{_command(first, notes, checkout)}`",
        f"{statistics.median(run.seconds for run in runs):,.0f} on {_processor(first)}",
        figure,
        f"{len(tested)}",
        *_published(notes, first.model, data),
    )


def _processor(record: Record) -> str:
    hardware = record.hardware
    if hardware.get("gpu"):
        return f"{record.num_processes} × {hardware['gpu']}"
    return f"{hardware['threads']} × {NOISE.sub('', hardware['cpu']).strip()}"


def _published(notes: dict[str, Any], model: str, data: str) -> tuple[str, str]:
    """A figure of others with what it is of, and its budget."""
    found = notes["published"].get(data, {}).get(model)
    if found is None:
        return "-", "-"
    source = found["source"]
    return f"{found['percent']:.2f} ({found['what']}, {source})", notes["budgets"][source]


def _command(record: Record, notes: dict[str, Any], checkout: Checkout) -> str:
    recipe_hash = str(record.recipe_hash)
    named = notes["commands"].get(recipe_hash)
    if named is not None:
        return str(named)
    where = "" if record.data == "digits" else " --data-dir DIR"
    for name, (model, kwargs) in _shipped().items():
        changes = {"model": record.model, "model_kwargs": record.model_kwargs}
        if load_recipe(name, changes).digest == recipe_hash:
            own = (model, kwargs) == (record.model, record.model_kwargs)
            return f"train --recipe {name}{where}" + ("" if own else f" --model {record.model}")
    stored = checkout.stored_recipe(recipe_hash)
    if not stored.is_file():
        raise UserError(
            f"No recipe gives {recipe_hash}, the hash of a run of {record.model} on {record.data}; "
            f"store it as {stored}."
        )
    return f"train --recipe {stored.relative_to(checkout.root).as_posix()}{where}"


@functools.cache
def _shipped() -> dict[str, tuple[str, dict[str, Any]]]:
    recipes = {name: load_recipe(name, {}) for name in shipped_recipes()}
    return {name: (recipe.model, recipe.model_kwargs) for name, recipe in recipes.items()}
