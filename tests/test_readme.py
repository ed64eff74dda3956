"""The README's blocks do what they say."""

import csv
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import timm

from timm_xformers import cli
from timm_xformers.benchmarking.settings import BASELINE
from timm_xformers.recipe import shipped_recipes
from timm_xformers.weights import read_manifest
from tools.benchmark_summary import summary

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]
COMMANDS = [
    line.split("timm-xformers ", 1)[1] if " && " in line else line.removeprefix("timm-xformers ")
    for code in SHELL
    for line in code.splitlines()
    if re.search(r"(^|bin/)timm-xformers ", line)
]


def test_it_is_short_enough_to_read():
    assert len(TEXT.splitlines()) < 200


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:40])
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    promised = re.findall(r"# (torch\.Size.*)$", code, flags=re.MULTILINE)
    assert all(line in capsys.readouterr().out for line in promised)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    words = shlex.split(command)
    assert words[0] in cli.COMMANDS
    if "--recipe" in words:
        assert words[words.index("--recipe") + 1] in shipped_recipes()
    if "--model" in words:
        model = words[words.index("--model") + 1]
        assert model.startswith("local-dir:") or timm.is_model(model)
    parser, _ = cli._parser()
    parser.parse_args(words)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4
    assert len(PYTHON) >= 2


def test_names_in_the_tables_exist():
    named = set(re.findall(r"`((?:(?:hybrid_)?vix_|levi|cc[tpnl]|swin_)[a-z0-9_]*)`", TEXT))
    assert len(named) > 20
    assert named <= {*timm.list_models(), *shipped_recipes()}


def test_models_table_is_what_its_command_prints(capsys):
    (command,) = [words for words in COMMANDS if words.startswith("models --format markdown")]
    assert cli.main(shlex.split(command)) == 0
    table = re.search(r"<!-- models -->\n(.*?)<!-- /models -->", TEXT, flags=re.DOTALL)[1]
    assert table == capsys.readouterr().out


def test_speed_table_is_the_summary_of_the_committed_figures():
    folder = ROOT / "docs" / "speed" / "readme"
    with (folder / "benchmark.csv").open(encoding="utf-8", newline="") as file:
        table = summary(list(csv.DictReader(file)), BASELINE)
    assert table == (folder / "summary.md").read_text(encoding="utf-8")
    assert table == re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", TEXT, flags=re.DOTALL)[1]


@pytest.mark.slow
def test_train_and_evaluate_block_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(code for code in SHELL if "runs/pixels" in code)
    for line in block.splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0


def test_every_figure_of_the_tables_of_results_comes_from_a_record():
    wanted = set()
    results = ROOT / "results"
    loaded = {  # weights of the package, by run
        (name.partition(".")[0], test["recipe_hash"]): test["test_top1_percent"]
        for name in read_manifest()
        for test in [json.loads((results / "weights" / f"{name}.json").read_text("utf-8"))]
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
    shown = results_in((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert len(shown) > 0
    assert sorted(shown) == sorted(wanted)
    assert set(results_in(TEXT)) < set(shown)


def results_in(text):
    table = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", text, flags=re.DOTALL)[1]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    return [(row[0], row[1].partition(":")[0], row[5], row[6]) for row in cells]
