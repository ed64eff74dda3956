"""What is written from records alone: cards of packaged weights, tables of results, studies.

Tests compare the files with what these functions give, so that nothing is edited by hand.
"""

import re
import subprocess
import sys
from pathlib import Path

from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.planning.catalog import build_empty
from timm_xformers.publishing.card import Card, reproduction, write_card
from timm_xformers.records.results_json import Record
from timm_xformers.studies.running.definition import load_study
from timm_xformers.studies.running.page import page_files
from timm_xformers.weights import Weights, read_manifest
from tools.checkout import Checkout
from tools.readme_table import readme_table
from tools.result_tables import best_table, results_table, source_sentence
from tools.retrofit_page import read_evidence, retrofit_tables
from tools.speed_page import speed_blocks

__all__ = ["package_cards", "stale_files", "write_generated"]

BLOCK = re.compile(
    r"(<!-- (results|best|readme|retrofit \w+|speed \w+) -->\n).*?(?=<!-- /\2 -->)", flags=re.DOTALL
)
# The table of models, below the command that prints it.
MODELS = re.compile(
    r"(^timm-xformers (models [^\n]*)\n```\n\n<!-- models -->\n).*?(?=<!-- /models -->)",
    flags=re.DOTALL | re.MULTILINE,
)


def write_generated(checkout: Checkout) -> None:
    """Write cards and tables anew."""
    checkout.cards.mkdir(exist_ok=True)
    for name, text in package_cards(checkout).items():
        write_text(checkout.card(name), text)
    for path, text in _pages(checkout).items():
        path.parent.mkdir(exist_ok=True)  # of a study's table
        write_text(path, text)
    if checkout.models_page.is_file():
        page = checkout.models_page.read_text(encoding="utf-8")
        page = MODELS.sub(lambda found: found[1] + _models_table(found[2], checkout), page)
        write_text(checkout.models_page, page)


def _pages(checkout: Checkout) -> dict[Path, str]:
    """Pages with tables from records, as they should be."""
    tables = {"readme": readme_table(checkout), "results": results_table(checkout)}
    tables["best"] = best_table(checkout)
    tables |= {
        f"retrofit {folder.name}": "\n".join(["", *retrofit_tables(read_evidence(folder)), "", ""])
        for folder in checkout.retrofits()
    }
    pages = [checkout.readme, checkout.results_page, checkout.records_page]
    if checkout.retrofits():
        pages.append(checkout.retrofit_page)
    if checkout.speed_page.is_file():
        tables |= speed_blocks(checkout.speed)
        pages.append(checkout.speed_page)
    found = {
        path: BLOCK.sub(lambda found: found[1] + tables[found[2]], path.read_text(encoding="utf-8"))
        for path in pages
    }
    for folder, page in checkout.studies():
        study = load_study(folder / "study.yaml")
        found |= page_files(study, folder, page, checkout.root)
    return found


def _models_table(command: str, checkout: Checkout) -> str:
    """What the page's command prints, in a process that has not met the manifest of before."""
    done = subprocess.run(
        [sys.executable, "-m", "timm_xformers", *command.split()],
        cwd=checkout.root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"`timm-xformers {command}` of {checkout.models_page} fails; correct it there."
        )
    return done.stdout


def stale_files(checkout: Checkout) -> list[str]:
    """Generated files that differ from what `write_generated` would write, or should not be."""
    cards = package_cards(checkout)
    found = {path.stem: path.read_text(encoding="utf-8") for path in checkout.cards.glob("*.md")}
    stale = [name for name in sorted({*cards, *found}) if cards.get(name) != found.get(name)]
    files = [f"model_cards/{name}.md" for name in stale]
    files += [
        path.relative_to(checkout.root).as_posix()
        for path, text in _pages(checkout).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return files


def package_cards(checkout: Checkout) -> dict[str, str]:
    """The card of every file of packaged weights, by name."""
    records = checkout.training_records()
    manifest = read_manifest(checkout.weights)
    return {
        name: write_card(_card(entry, records.get(entry.tag, []), checkout, _namesakes(manifest)))
        for name, entry in manifest.items()
        if entry.card == name
    }


def _namesakes(manifest: dict[str, Weights]) -> dict[str, list[str]]:
    """Other tags that load a tag's file."""
    found: dict[str, list[str]] = {}
    for name, entry in manifest.items():
        if entry.card != name:
            found.setdefault(entry.card, []).append(f"`{name}`")
    return found


def _card(
    entry: Weights, records: list[Record], checkout: Checkout, namesakes: dict[str, list[str]]
) -> Card:
    wanted = entry.model, entry.recipe_hash, entry.seed
    trained = [
        record
        for record in records  # a run that began with another tag's weights has it in its name
        if (record.model.partition(".")[0], record.recipe_hash, record.seed) == wanted
    ]
    if not trained:
        raise UserError(
            f"results/{entry.tag}.jsonl has no run of {entry.model} with recipe "
            f"{entry.recipe_hash} and seed {entry.seed}; put the record of {entry.name} back."
        )
    recipe = checkout.load_recipe(entry.recipe_hash)
    repeat, command = reproduction(trained[-1], recipe, ", with the settings above as recipe.yaml")
    return Card(
        title=entry.name,
        load=entry.name,
        attention=build_empty(entry.model).attn_layer,
        trained=trained[-1],
        tested=checkout.load_float16_record(entry.name),
        recipe=recipe,
        repeat=repeat,
        command=command,
        license=entry.license,
        source=source_sentence(checkout.load_notes(), entry.model, entry.tag),
        namesakes=" and ".join(namesakes.get(entry.name, [])),
        calibration=_calibration(checkout.load_calibration(entry.name)),
    )


def _calibration(found: dict[str, float] | None) -> str:
    if found is None:
        return Card.calibration
    sure, right = found["confidence_percent"], found["top1_percent"]
    return (
        f"{Card.calibration} On the test images they say {sure:.1f} % on average where "
        f"{right:.1f} % are right: expected calibration error {found['ece_percent']:.1f} % (15 "
        f"bins); dividing the logits by {found['temperature']:g} leaves "
        f"{found['ece_with_it_percent']:.1f} %, fitted on the same images."
    )
