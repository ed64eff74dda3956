"""The README's form, and its tables and those of the documentation against what they come from.

What the pages' code does: tests/docs/test_pages.py.
"""

import csv
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest

from timm_xformers import cli
from timm_xformers.benchmarking.settings import BASELINE
from timm_xformers.studies.running.definition import load_study
from timm_xformers.weights import read_manifest
from tools.checkout import this_checkout
from tools.readme_table import LAYERS, draw_tokens, readme_table
from tools.speed_tables import summary

ROOT = Path(__file__).parents[1]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def block(name, marker):
    return re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", page(name), flags=re.DOTALL)[1]


def cells(table):
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_it_is_short_enough_to_read():
    lines = page("README.md").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("marker", ["train-command", "test-command"])
def test_commands_that_ci_reads_are_there(marker):
    assert re.search(rf"^<!-- {marker} -->\n```bash\n.+\n```$", page("README.md"), re.MULTILINE)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ("unbiased estimate of softmax attention", "only the kernel's estimate is unbiased"),
        ("every ViX name on digits", "20 of 24"),
        ("stratified tenth chooses", "some recipes hold out 4 % or less"),
        ("at no loss", "one small run"),
        ("no loss of growing", "one small run"),
        ("98.50 ± 0.17", "mixes commits, unless the table of records says it"),
    ],
)
def test_claims_that_were_found_false_stay_out(claim, why):
    for name in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", page(name), flags=re.DOTALL)
        assert claim not in " ".join(text.split()), f"{name}: {why}"


def test_readme_table_is_one_study_with_exact_attention_first():
    rows = cells(block("README.md", "readme"))
    assert 3 <= len(rows) <= 7
    assert rows[0][0] == "exact"
    wanted = this_checkout().load_notes()["readme"]
    study = load_study(ROOT / wanted["study"] / "study.yaml")
    assert next(iter(wanted["arms"])) == study.baseline
    assert block("README.md", "readme") == readme_table(this_checkout())


def test_readme_table_has_the_figures_of_the_records():
    wanted = this_checkout().load_notes()["readme"]
    rows = cells(block("README.md", "readme"))
    for arm, (_, accuracy, seeds, *_) in zip(wanted["arms"], rows, strict=True):
        paths = (ROOT / wanted["study"] / "records").glob(f"{arm}-s*/results.json")
        tested = [json.loads(path.read_text())["test_top1_percent"] for path in paths]
        assert len(tested) == int(seeds)
        assert float(accuracy.split()[0]) == pytest.approx(statistics.mean(tested), abs=0.006)


def test_picture_can_be_drawn_again(tmp_path):
    assert len(LAYERS) <= 7
    assert next(iter(LAYERS)) == BASELINE
    shutil.copytree(ROOT / "docs" / "speed" / "readme", tmp_path / "readme")
    assert draw_tokens(tmp_path).stat().st_size > 20_000
    assert (ROOT / "docs" / "speed" / "tokens.png").is_file()


def test_models_table_is_what_its_command_prints(capsys):
    command = re.search(
        r"^timm-xformers (models .*--format markdown .*)$", page("docs/models.md"), re.M
    )
    assert cli.main(shlex.split(command[1])) == 0
    assert block("docs/models.md", "models") == capsys.readouterr().out


def test_speed_table_is_the_summary_of_the_committed_figures():
    with (ROOT / "docs" / "speed" / "readme" / "benchmark.csv").open(encoding="utf-8") as file:
        table = summary(list(csv.DictReader(file)), BASELINE)
    assert table == block("docs/speed.md", "speed readme")


def test_every_figure_of_the_table_of_results_comes_from_a_record():
    wanted = set()
    results = ROOT / "results"
    loaded = {  # weights of the package, by run
        (entry.model, entry.recipe_hash): test["test_top1_percent"]
        for entry in read_manifest().values()
        for test in [json.loads((results / "weights" / f"{entry.card}.json").read_text("utf-8"))]
    }
    for path in sorted(results.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for model, recipe in {(record["model"], record["recipe_hash"]) for record in records}:
            runs = [
                r["test_top1_percent"]
                for r in records
                if (r["model"], r["recipe_hash"]) == (model, recipe)
            ]
            if len(runs) == 1:
                runs = [loaded.get((model, recipe), runs[0])]
            figure = f"{statistics.mean(runs):.2f}"
            if len(runs) > 1:
                figure += f" ± {statistics.stdev(runs):.2f}"
            wanted.add((f"`{model}`", path.stem, figure, str(len(runs))))
    rows = cells(block("docs/records.md", "results"))
    shown = [(row[0], row[1].partition(":")[0], row[5], row[6]) for row in rows]
    assert len(shown) > 0
    assert sorted(shown) == sorted(wanted)
    best = cells(block("docs/results.md", "best"))
    tops = {}
    for row in wanted:
        tops[row[1]] = max(tops.get(row[1], 0.0), float(row[2].split()[0]))
    assert {row[0].partition(":")[0]: float(row[3].split()[0]) for row in best} == tops
