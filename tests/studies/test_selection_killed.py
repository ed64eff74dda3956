"""A selection that is killed again and again ends like one that was left alone."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID = "grid: {lr: [1.0e-3, 3.0e-3], model_kwargs.depth: [1, 2]}\nfolds: 2\n"
SEARCH = (
    "search: {lr: {low: 1e-3, high: 1e-2, log: true}, model_kwargs.depth: {low: 1, high: 2}}\n"
    "folds: 2\ntrials: 7\npruner: median\n"
)


def start(space, output, *flags):
    command = [
        *(sys.executable, "-m", "timm_xformers", "select", "--model", "vit_tiny_patch16_224"),
        *("--set", "model_kwargs={patch_size: 4, embed_dim: 32, num_heads: 2}", "--epochs", "2"),
        *("--space", str(space), "--output", str(output), *flags),
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with output.with_suffix(".err").open("a") as err:
        return subprocess.Popen(
            command, env=environ, stderr=err, stdout=err, start_new_session=True
        )


def outcome(folder):
    """Everything but times: the table without its seconds, the recipe and the weights."""
    with (folder / "selection.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    weights = (folder / "final" / "best" / "model.safetensors").read_bytes()
    return rows, (folder / "best.yaml").read_bytes(), weights


def completions(folder):
    log = (folder / "log.txt").read_text()
    return re.findall(r"((?:configuration|trial) \d+\S* fold \d+)/\d+:", log)


def kill_until_done(space, output, rng, *flags):
    """Start, kill after a random time, start again; then let one start finish."""
    kills = 0
    while kills < 5:
        process = start(space, output, *flags)
        # The way to the first training is long: the clock starts when there is a folder.
        while not output.exists() and process.poll() is None:
            time.sleep(0.05)
        done = len(completions(output)) if (output / "log.txt").exists() else 0
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            log = output / "log.txt"
            if log.exists() and len(completions(output)) > done:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    last = start(space, output, *flags)
    assert last.wait(timeout=300) == 0, output.with_suffix(".err").read_text()[-2000:]
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "flags"),
    [
        pytest.param(GRID, (), id="grid"),
        pytest.param(GRID, ("--workers", "2"), id="grid-two-workers"),
        pytest.param(SEARCH, (), id="search"),
    ],
)
def test_killed_selection_ends_like_an_undisturbed_one(tmp_path, text, flags):
    if "search" in text:
        pytest.importorskip("optuna", reason="the search extra is not installed")
    space = tmp_path / "space.yaml"
    space.write_text(text)
    undisturbed = start(space, tmp_path / "undisturbed")
    assert undisturbed.wait(timeout=300) == 0

    kills = kill_until_done(space, tmp_path / "killed", random.Random(0), *flags)

    assert kills >= 2
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
    done = completions(tmp_path / "killed")
    assert len(done) == len(set(done)), "a task ran twice to completion"
    assert set(done) <= set(completions(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_same_command_started_twice_shares_the_work(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(GRID)
    output = tmp_path / "shared"
    both = [start(space, output), start(space, output)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert sorted(completions(output)) == [
        f"configuration {c}/4 fold {f}" for c in range(1, 5) for f in (1, 2)
    ]
