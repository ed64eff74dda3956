"""The comparison with timm's train.py: what it reads, which figures it forms, what it starts."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from timm_xformers.data.data import refuse_unread
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_csv import EpochRow, write_history
from tools import throughput
from tools.throughput import Comparison, Epoch, timm_epochs
from tools.throughput_cases import (
    BATCH_SIZE,
    CASES,
    EPOCHS,
    our_settings,
    timm_settings,
)
from tools.throughput_report import OURS, PEERS, Measurement, compare_case

from ..made_records import record

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compare_throughput.py"
RECORD = record(
    data="folder",
    img_size=32,
    in_chans=3,
    batch_size=BATCH_SIZE,
    commit="c0ffee",
    versions={"timm": "1"},
    hardware={"cpu": "a processor", "cores": 2, "threads": 1},
)


def log_line(epoch, step, steps, rate, wait):
    """As train.py writes it; rates and waits of a single batch are decoys."""
    return (
        f"Train: {epoch} [{step:>4d}/{steps} ({100 * (step + 1) / steps:>3.0f}%)]  "
        f"Loss: 2.30 (2.31)  Time: 0.001s, {99999:>7.2f}/s  ({BATCH_SIZE / rate:.3f}s, "
        f"{rate:>7.2f}/s)  LR: 1.000e-03  Data: 0.009 ({wait:.3f})\n"
    )


def timm_log(steps, rates, wait=0.1):
    lines = ["Training with a single process on 1 device (cpu).\n"]
    for epoch, rate in enumerate(rates):
        lines += [
            log_line(epoch, 0, steps, 1.0, 5.0),
            log_line(epoch, steps - 1, steps, rate, wait),
        ]
    return "".join(lines)


def measurements(number, ours, timm, plain, case="loader"):
    sides = zip((OURS, *PEERS), (ours, timm, plain), strict=True)
    return [Measurement(case, number, side, rate, 10.0, 5.0, 0.1) for side, rate in sides]


def test_epochs_of_train_py_are_read_at_their_last_batch():
    epochs = timm_epochs(timm_log(5, [640.0, 12.5]))
    assert epochs == [Epoch(640, 1.0, 0.5), Epoch(640, 51.2, 0.5)]


def test_an_epoch_that_was_cut_off_is_none():
    assert timm_epochs(timm_log(5, [640.0]) + log_line(1, 3, 5, 640.0, 0.1)) == [Epoch(640, 1, 0.5)]
    assert timm_epochs("nothing of the kind") == []


def test_ratios_are_formed_within_rounds_and_to_the_faster_setting():
    found = [
        *measurements(1, ours=300, timm=100, plain=90),
        *measurements(2, ours=200, timm=50, plain=120),  # the plain one wins here, but not overall
        *measurements(3, ours=100, timm=100, plain=80),
    ]
    summary = compare_case(found)
    assert summary["peer"] == PEERS[0]
    assert summary["ratios"] == [3.0, 4.0, 1.0]
    assert (summary["ratio_median"], summary["ratio_min"], summary["ratio_max"]) == (3.0, 1.0, 4.0)
    assert (summary["ours"]["images_per_s"], summary["timm"]["images_per_s"]) == (200, 100)
    assert compare_case(measurements(1, 300, 100, 150))["peer"] == PEERS[1]


def test_a_round_without_one_side_counts_for_nothing():
    found = [*measurements(1, 300, 100, 90), *measurements(2, 900, 100, 90)[:2]]
    assert compare_case(found)["ratios"] == [3.0]


@pytest.mark.parametrize("name", CASES)
def test_both_sides_of_a_case_are_told_the_same(name, image_folder):
    case = CASES[name]
    ours = our_settings(case, image_folder, Path("o"), workers=3, seed=7)
    recipe = Recipe(**ours)
    refuse_unread(recipe, recipe.in_memory)
    timm = timm_settings(case, image_folder, Path("t"), workers=3, seed=7, prefetcher=True)
    for key in (
        *("model", "data_dir", "img_size", "in_chans", "epochs", "batch_size", "opt", "lr"),
        *("weight_decay", "warmup_epochs", "smoothing", "seed"),
    ):
        assert ours[key] == timm[key], key
    assert ours["num_workers"] == timm["workers"] == 3
    assert timm["num_classes"] == 2
    assert not timm["no_prefetcher"]
    if not recipe.in_memory:  # then train.py's defaults are what we were told
        assert timm["train_interpolation"] == "bicubic"
        assert timm.keys().isdisjoint({"scale", "ratio", "hflip", "color_jitter"})


@pytest.fixture
def comparison(tmp_path):
    train_py = tmp_path / "clone" / "train.py"
    train_py.parent.mkdir()
    train_py.write_text("print('timm')\n", encoding="utf-8")
    return lambda **values: Comparison(
        **{
            "train_py": train_py,
            "data": "digits",
            "data_dir": None,
            "output": tmp_path / "out",
            "rounds": 2,
            "cases": ["memory", "loader"],
            "steps": 2,
            "threads": 3,
            "workers": 1,
            "seed": 0,
            **values,
        }
    )


@pytest.fixture
def started(monkeypatch):
    """Replaces the processes by what they would leave; holds their configurations and threads."""
    calls = []

    def fake(command, *, cwd, env, stdout, **_):
        config = yaml.safe_load(Path(command[-1]).read_text(encoding="utf-8"))
        images = list(Path(config["data_dir"], "train").rglob("*.png"))
        calls.append((config, env["OMP_NUM_THREADS"], len(images), Path(command[1]).parent == cwd))
        if "-m" in command:
            root = Path(config["output"])
            root.mkdir()
            row = (1e-3, 1.0, 1.0, None, None, None)
            # 256 images, the first epoch slow, the others in 1 and 3 seconds.
            rows = [EpochRow(i + 1, *row, s, 256, 0.5) for i, s in enumerate((100.0, 1.0, 3.0))]
            write_history(root / "results.csv", rows)
            RECORD.save(root / "results.json")
        else:
            rate = 16.0 if config["no_prefetcher"] else 32.0
            stdout.write(timm_log(2, [1.0, rate, rate]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(throughput.subprocess, "run", fake)
    return calls


def test_every_round_runs_every_side_and_the_first_epoch_is_left_out(comparison, started, tmp_path):
    text = comparison().run().read_text(encoding="utf-8")
    result = json.loads((tmp_path / "out" / "throughput.json").read_text(encoding="utf-8"))

    assert len(started) == len(result["measurements"]) == 2 * 2 * 3
    assert {threads for _, threads, *_ in started} == {"3"}
    assert {images for _, _, images, _ in started} == {2 * BATCH_SIZE}
    # A clone has a folder timm beside train.py: it must not be the one that is imported.
    assert all(in_cwd for config, *_, in_cwd in started if "no_prefetcher" in config)
    sides = [tuple(e["side"] for e in result["measurements"][i : i + 3]) for i in range(0, 12, 3)]
    assert all(set(three) == {OURS, *PEERS} for three in sides)
    assert len(set(sides)) > 1  # shuffled
    case = result["cases"]["loader"]
    assert case["ours"]["images_per_s"] == 128.0  # 2 * 256 images in 1 + 3 s
    assert case["ours"]["data_wait_percent"] == 25.0
    assert case["timm"]["images_per_s"] == 32.0
    assert case["ratios"] == [4.0, 4.0]
    assert (result["commit"], result["seed"]) == ("c0ffee", 0)
    assert "| loader | `vix_mnist_nano` | 128 | 32 | default | 4.00 | 4.00 to 4.00 of 2 |" in text
    assert "a processor" in text
    assert all(CASES[name].words in text for name in ("memory", "loader"))
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 12


def test_fewer_epochs_than_asked_for_are_refused(comparison, started, monkeypatch):
    monkeypatch.setattr(throughput, "EPOCHS", EPOCHS + 1)
    with pytest.raises(UserError, match=f"3 whole epochs of {EPOCHS + 1}"):
        comparison().run()


def test_what_does_not_fit_is_said_in_a_sentence(comparison, tmp_path):
    with pytest.raises(UsageError, match="does not exist; take"):
        comparison(train_py=tmp_path / "none.py").run()
    with pytest.raises(UserError, match="1198 training images, and 50 steps of 128 need 6400"):
        comparison(steps=50, output=tmp_path / "many").run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        comparison(output=tmp_path / "full").run()


def test_a_side_that_fails_is_quoted(comparison, monkeypatch):
    def fail(command, *, stdout, **_):
        stdout.write("a traceback\nRuntimeError: no luck\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(throughput.subprocess, "run", fail)
    with pytest.raises(UserError, match=r"code 1 in case .*RuntimeError: no luck"):
        comparison().run()


def run_script(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_script_reads_its_flags(started, comparison, tmp_path, monkeypatch, capsys):
    train_py = str(comparison().train_py)
    flags = ["--train-py", train_py, "--output", "out", "--data", "digits", "--rounds", "1"]
    flags += ["--cases", "loader", "--steps", "3", "--threads", "2", "--workers", "4"]
    assert run_script([*flags, "--seed", "5"], monkeypatch) == 0
    assert "| loader |" in capsys.readouterr().out
    assert len(started) == 3
    config, threads, images, _ = started[0]
    assert (threads, images, config["seed"]) == ("2", 3 * BATCH_SIZE, 5)
    assert config.get("workers", config.get("num_workers")) == 4


def test_script_fails_with_a_sentence(monkeypatch, capsys):
    assert run_script(["--train-py", "none.py", "--output", "out"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: --train-py none.py does not exist")
    assert run_script(["--help"], monkeypatch) == 0
    assert run_script(["--train-py", "x", "--output", "o", "--rounds", "0"], monkeypatch) == 2


@pytest.mark.slow
def test_our_side_in_a_process_of_its_own(comparison, tmp_path):
    """The real trainer, beside a script that says what train.py would."""
    stub = tmp_path / "clone" / "train.py"
    stub.write_text(f"print({timm_log(2, [1.0, 32.0, 32.0])!r})", encoding="utf-8")
    comparison(rounds=1, cases=["memory"], threads=1).run()
    result = json.loads((tmp_path / "out" / "throughput.json").read_text(encoding="utf-8"))
    assert result["hardware"]["threads"] == 1
    assert result["hardware"]["device"] == "cpu"
    assert result["cases"]["memory"]["ratio_median"] > 0
