"""The command line: answers at once, exits with the right code, the same from every door."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from timm_xformers.cli import main
from timm_xformers.weights import read_manifest

from ..made_records import record

pytestmark = pytest.mark.usefixtures("quick_pictures")

SCRIPTS = Path(__file__).resolve().parents[2] / "train_scripts"
TINY = [
    "--model",
    "vix_performer_softmax_m32",
    "--set",
    "model_kwargs={patch_size: 4, embed_dim: 32, depth: 1}",
    "--epochs",
    "1",
    "--set",
    "warmup_epochs=0",
]


@pytest.fixture(autouse=True)
def _clean_slate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_script(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return stop.value.code


def test_scripts_train_and_evaluate_our_model(monkeypatch, capsys, tmp_path):
    part = ["--limit", "200", "--classes", "7,3,1"]
    arguments = [*TINY, *part, "--output", "run", "--seed", "3"]
    assert run_script("train.py", arguments, monkeypatch) == 0
    assert "Results are in run" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (record["seed"], record["model"]) == (3, "vix_performer_softmax_m32")
    assert record["num_classes"] == 3
    assert "(200 training, " in (tmp_path / "run" / "log.txt").read_text()

    arguments = ["--model", "local-dir:run/best", *part[2:], "--output", "again.json"]
    assert run_script("evaluate.py", arguments, monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "again.json").read_text())
    assert printed["test_top1_percent"] == record["test_top1_percent"]
    assert printed["test_loss"] == record["test_loss"]

    assert run_script("report.py", ["run", "again.json"], monkeypatch) == 0
    assert capsys.readouterr().out == "2 runs in 2 groups are compared in report/report.md\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("train --model vit_tiny_patch16_225", 2, "nearest: vit_tiny_patch16_224"),
        ("train --recipe digts", 2, "nearest: digits"),
        ("train --set learning_rate=1", 2, "no setting 'learning_rate'"),
        ("train --set lr", 2, "key=value"),
        ("train --epochs 0", 2, "at least 1"),
        ("train --data mnist", 1, "needs a folder"),
        ("train --data-dir nowhere", 1, "nowhere does not exist"),
        ("train --resume nowhere", 1, "holds no run"),
        ("train --resume nowhere --epochs 3", 2, "cannot change epochs"),
        ("train --img-size 10 --model vit_tiny_patch16_224 --set model_kwargs.patch_size=4", 2,
         "use 8 or 12"),
        ("evaluate", 2, "Name a model"),
        ("report nowhere", 1, "nowhere does not exist"),
        ("train --set trackers=[tensorbord]", 2, "trackers='tensorbord' is unknown"),
        ("evaluate --model local-dir:nowhere", 1, "config.json is missing"),
        ("select --space mnist_stud", 2, "nearest: mnist_study"),
        ("select --space mnist_study --workers 0", 2, "--workers 0"),
        ("select --space mnist_study", 1, "Configuration 1 (model_kwargs.double_softmax=True"),
        ("select --space mnist_study --data-dir nowhere", 1, "nowhere does not exist"),
        ("models vix_sofmax", 2, "nearest: vix_softmax"),
        ("models --mechanism performr", 2, "nearest: performer"),
        ("models vix_softmax --max-params 600k", 2, "None of the 1 matching"),
        ("models --attention nystrom_64", 2, "nearest: nystrom_l64"),
        ("models --attention --img-size 8 --sort name", 2, "--img-size, --sort cannot go with it"),
        ("convert nowhere --to-package", 2, "python -m tools.add_weights nowhere"),
        ("convert nowhere", 2, "convert needs --output FOLDER"),
        ("convert nowhere --output half", 1, "nowhere holds no run"),
        ("publish nowhere me/x", 1, "nowhere holds no run"),
        ("publish nowhere x", 2, "'x' is no name on the Hub"),
        ("predict vix_sofmax nowhere.png", 1, "nowhere.png does not exist"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_a_code(arguments, code, words, capsys, tmp_path):
    assert main(arguments.split()) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train", "--epochs", "two"],
        ["models", "--max-params", "lots"],
        ["models", "--img-size", "0"],
        ["report"],
        ["report", "run", "--sort", "beauty"],
        ["select"],
        ["publish", "run"],
        ["predict", "vix_softmax"],
        ["predict", "vix_softmax", "image.png", "--top-k", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: timm-xformers" in capsys.readouterr().err


def test_missing_rights_are_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", *TINY, "--output", "file/run"]) == 1
    assert "choose another --output" in capsys.readouterr().err
    command = ["evaluate", "--json", "--model", "vit_tiny_patch16_224"]
    command += ["--output", "nowhere/r.json"]
    monkeypatch.setattr("timm_xformers.predicting.evaluate.evaluate", lambda *_, **__: record())
    assert main(command) == 1
    assert "nowhere/r.json: No such file or directory" in capsys.readouterr().err
    (tmp_path / "runs").write_text("")
    assert main(["train", *TINY]) == 1
    assert "Cannot create the run folder runs" in capsys.readouterr().err


def test_missing_extra_gives_the_install_line(monkeypatch, capsys):
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "accelerate" else find_spec(n))
    assert main(["train"]) == 1
    assert 'pip install "timm-xformers[train]"' in capsys.readouterr().err


SHARED_FLAGS = ("--recipe", "--model", "--data-dir", "--batch-size", "--seed", "--set")
MODELS_FLAGS = (
    "--attention",
    "--mechanism",
    "--pretrained",
    "--max-params",
    "--img-size",
    "--sort",
)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", SHARED_FLAGS),
        ("evaluate", [*SHARED_FLAGS, "--details"]),
        ("report", ["--output", "--sort", "--metric"]),
        ("select", [*SHARED_FLAGS, "--space", "--workers", "--no-final"]),
        ("models", MODELS_FLAGS),
        ("benchmark", ["--preset", "--contenders", "--models", "--tokens", "--allocator"]),
        ("predict", ["--json", "--grid", "--top-k"]),
        ("publish", ["--dry-run", "--private"]),
        ("convert", ["--output", "--data-dir"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_help_answers_at_once_without_torch(command, flags):
    code = (
        "import sys; from timm_xformers.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    for _ in range(3):  # once in three: what else runs on the machine may slow it
        start = os.times()
        result = subprocess.run(
            [sys.executable, "-c", code, command, "--help"],
            capture_output=True,
            text=True,
            cwd=SCRIPTS.parent,
        )
        end = os.times()
        user, system = end.children_user, end.children_system
        seconds = user + system - start.children_user - start.children_system
        assert result.returncode == 0, result.stderr
        for flag in flags:
            assert flag in result.stdout
        if seconds < 0.5:  # of the processor
            break
    assert seconds < 0.5


def test_script_selects_by_what_the_space_says(monkeypatch, capsys, tmp_path):
    (tmp_path / "space.yaml").write_text("grid: {lr: [1.0e-3, 3.0e-3]}\nfolds: 1\n")
    arguments = [*TINY, "--space", "space.yaml", "--output", "chosen", "--no-final"]
    assert run_script("select_model.py", arguments, monkeypatch) == 0
    assert "Best is lr 0.00" in capsys.readouterr().out
    assert {"best.yaml", "selection.csv", "selection.md", "selection.png"} <= {
        path.name for path in (tmp_path / "chosen").iterdir()
    }
    assert not (tmp_path / "chosen" / "final").exists()


def test_data_set_chooses_its_recipe(monkeypatch):
    from timm_xformers.commands import options
    from timm_xformers.recipe import Recipe, load_recipe

    def recipe_of(text):
        parser = options.argparse.ArgumentParser()
        options.add_recipe_options(parser)
        return options.recipe_from(parser.parse_args(text.split()))

    assert recipe_of("") == load_recipe("digits", {})
    assert recipe_of("--data mnist --seed 4") == load_recipe("mnist", {"seed": 4})
    assert recipe_of("--data-dir x") == Recipe(data="folder", data_dir="x")
    assert recipe_of("--data cifar10 --set lr=0.5") == load_recipe("cifar10", {"lr": 0.5})
    assert recipe_of("--data wds/x --set lr=0.5 epochs=3") == Recipe(data="wds/x", lr=0.5, epochs=3)
    assert recipe_of("--recipe mnist --data-dir x").data == "mnist"
    assert recipe_of("--data cifar10 --classes cat,3").classes == ["cat", "3"]


def models(arguments, capsys):
    assert main(["models", *arguments.split()]) == 0
    return capsys.readouterr()


def test_models_as_a_table(capsys):
    lines = models("vix_softmax vix_performer_relu_m?[26] --img-size 8 --max-params 1M", capsys).out
    header, first, *others = lines.splitlines()
    assert header.split()[:6] == ["model", "attention", "pixels", "tokens", "parameters", "GMACs"]
    assert header.endswith("MiB at batch 64  weights")
    assert first.split()[:5] == ["vix_softmax", "softmax", "8", "65", "538,890"]
    assert [line.split()[0][-3:] for line in others] == ["m16", "m32"]
    # Numbers are flush right: every line ends its memory column where the heading does.
    assert {line[: header.index("  weights")][-1].isdigit() for line in (first, *others)} == {True}


def test_models_as_data(capsys):
    names = "vix_softmax vix_fnet --img-size 8 --batch-size 3"
    found = json.loads(models(f"{names} --format json", capsys).out)
    assert [model["name"] for model in found] == ["vix_softmax", "vix_fnet"]
    assert {model["batch_size"] for model in found} == {3}
    tags = [entry.tag for entry in read_manifest().values() if entry.model == "vix_softmax"]
    assert found[0]["weights"] == tags
    header, first, _ = models(f"{names} --format csv", capsys).out.splitlines()
    assert header.split(",") == list(found[0])
    assert first.split(",")[:-1] == [str(value) for value in found[0].values()][:-1]


def test_models_in_order(monkeypatch, capsys):
    from timm_xformers.planning import catalog

    figures = {"b_m16": (1, 3.0, 2.0), "a": (2, 2.0, 3.0), "b_m4": (3, 1.0, 1.0)}
    listed = [
        catalog.Model(name, "softmax", 8, 64, params, gmacs, 64, memory, ())
        for name, (params, gmacs, memory) in figures.items()
    ]
    monkeypatch.setattr(catalog, "catalog", lambda *args, **kwargs: (list(listed), {}))

    def order(arguments):
        return [m["name"] for m in json.loads(models(f"{arguments} --format json", capsys).out)]

    assert order("") == ["b_m16", "a", "b_m4"]
    assert order("--sort name") == ["a", "b_m4", "b_m16"]
    assert order("--sort params") == ["b_m16", "a", "b_m4"]
    assert order("--sort gmacs") == ["b_m4", "a", "b_m16"]
    assert order("--sort memory") == ["b_m4", "b_m16", "a"]


def test_models_with_weights_of_one_mechanism(monkeypatch, capsys):
    monkeypatch.setattr("timm.list_pretrained", lambda: ["vix_softmax.digits", "vix_fnet.mnist"])
    out = models("--pretrained --img-size 8 --format json", capsys).out
    assert [(m["name"], m["weights"]) for m in json.loads(out)] == [
        ("vix_fnet", ["mnist"]),
        ("vix_softmax", ["digits"]),
    ]
    out = models("--pretrained --img-size 8 --mechanism soft* --format markdown", capsys).out
    assert out.splitlines()[2].startswith("| `vix_softmax` | softmax | 8 | 65 | 538,890 |")
    assert out.endswith(" | digits |\n")


def test_models_that_refuse_a_size_stand_below_the_others(capsys):
    arguments = (
        "vix_softmax vix_tiny*_l64 vix_small*_l64 vix_base*_m64 --max-params 30M --img-size 20"
    )
    table, note = models(arguments, capsys).out.split("\n\n")
    assert len(table.splitlines()) == 2
    assert note == (
        "Not measured: vix_tiny_patch16_224_nystrom_l64, vix_small_patch16_224_nystrom_l64: "
        "img_size=20 is not a multiple of patch_size=16; use 16 or 32.\n"
    )
    said = models(f"{arguments} --format json", capsys)
    assert len(json.loads(said.out)) == 1
    assert said.err == note
    assert models("vix_tiny*_l64 --img-size 20", capsys).out.startswith("Not measured: vix_tiny")


def test_models_lists_mechanisms(capsys):
    grid = ["keys", "no", "yes"]
    lines = models("--attention nystrom_l64* local2d_w8", capsys).out.splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["attention", "settings", "exact when", "masks", "causal", "fixed grid"],
        ["nystrom_l64", "num_landmarks=64", "tokens <= 64", "keys", "no", "no"],
        ["nystrom_l64_conv33", "num_landmarks=64 conv_kernel=33", "never", "keys", "no", "no"],
        ["nystrom_l64_dwc", "num_landmarks=64 dwc=True", "tokens <= 64, untrained", *grid],
        ["nystrom_l64_conv33_dwc", "num_landmarks=64 conv_kernel=33 dwc=True", "never", *grid],
        ["local2d_w8", "window_size=8", "side <= 2 * 8", "any", "yes", "yes"],
    ]
    (entry,) = json.loads(models("--attention softmax --format json", capsys).out)
    assert entry == {
        "name": "softmax",
        "settings": {},
        "exact_when": "always",
        "masks": "any",
        "causal": True,
        "needs_fixed_grid": False,
    }
    assert len(models("--attention --format csv", capsys).out.splitlines()) > 50


def test_recipes_and_settings_are_explained(capsys):
    from timm_xformers.recipe import Recipe, shipped_recipes

    names = [field.name for field in dataclasses.fields(Recipe)]
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*names, *shipped_recipes()))
    assert main(["recipe", "lr"]) == 0
    assert capsys.readouterr().out == (
        "# Peak learning rate. Takes a number, above 0. Default: 0.001.\nlr: 0.001\n"
    )
    assert main(["recipe", "sched"]) == 0
    assert "Takes text: cosine, tanh, poly" in capsys.readouterr().out
    assert main(["recipe", "digts"]) == 2
    assert "nearest: digits" in capsys.readouterr().err


def test_a_printed_recipe_is_a_recipe(capsys, tmp_path):
    from timm_xformers.recipe import load_recipe

    assert main(["recipe", "mnist_growing"]) == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "r.yaml"), {}) == load_recipe("mnist_growing", {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --lr 3", "lr is a setting: --set lr=VALUE"),
        ("train --weight-decay=3", "weight_decay is a setting"),
        ("train --attn-layer x", "--set model_kwargs.attn_layer=VALUE"),
        ("models --mechanim x", "nearest: --mechanism"),
    ],
)
def test_unknown_flags_point_to_the_way(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_train_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "mnist_growing" in said
    assert "recipe KEY" in said


def test_a_reader_that_left_ends_quietly():
    command = f"{sys.executable} -m timm_xformers recipe digits | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""
    assert result.returncode in (0, 141)


def test_what_stages_override_is_said(capsys, monkeypatch):
    from timm_xformers.commands import options

    def recipe_of(text):
        parser = options.argparse.ArgumentParser()
        options.add_recipe_options(parser)
        parser.add_argument("--epochs", type=int)
        return options.recipe_from(parser.parse_args(text.split()))

    recipe_of("--recipe mnist_growing --img-size 28")
    assert "stages train at 14, 28 pixels" in capsys.readouterr().err
    recipe_of("--recipe mnist_growing --img-size 28 --set stages=[]")
    assert capsys.readouterr().err == ""
    recipe = recipe_of("--data cifar100 --epochs 1")
    assert [stage["epoch"] for stage in recipe.stages] == [1]
    assert "moved to fit 1" in capsys.readouterr().err
