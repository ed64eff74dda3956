"""Two processes, on one machine or two, against one with the same global batch."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record
from timm_xformers.training.checkpoint import open_last

from .test_resume import assert_same_run

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    str(ROOT / "train_scripts" / "train.py"),
    "--model=vit_tiny_patch16_224",
    "--set=model_kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "--set=crop_pad=1",
    "--set=rotate_degrees=10",
    "--set=model_ema_decay=0.9",
    "--set=grad_accum_steps=2",
    "--set=clip_grad=1",
]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(processes, *arguments):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *COMMON, *arguments]


def launch_on_machines(machines, *arguments):
    """The commands of so many machines with a process each, as loopback stands in for a network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    launcher += [f"--nnodes={machines}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [[*launcher, f"--node_rank={rank}", *COMMON, *arguments] for rank in range(machines)]


def run_all(commands, folder):
    """Run commands side by side; what they said, together."""
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), said
    return tuple("".join(texts) for texts in zip(*said, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_learn_what_one_learns(tmp_path, machines):
    # Mixup pairs the images of a process's own batch, so two processes mix others.
    common = ("--epochs=3", "--set=mixup=0")
    alone = launch(1, *common, "--batch-size=64", "--output=run1")
    shared = (*common, "--batch-size=32", "--num-processes=2", "--output=run2")
    together = [launch(2, *shared)] if machines == 1 else launch_on_machines(2, *shared)
    for commands in ([alone], together):
        stdout, stderr = run_all(commands, tmp_path)
        # Only one process speaks.
        assert stderr.count("epoch 3/3") == 1
        assert stdout.count("Results are in") == 1

    one, two = (read_history(tmp_path / f"run{n}" / "results.csv") for n in (1, 2))
    for left, right in zip(one, two, strict=True):
        assert left.train_images == right.train_images
        assert left.train_loss == pytest.approx(right.train_loss, abs=2e-4)
        assert left.val_loss == pytest.approx(right.val_loss, abs=2e-4)
        assert left.val_top1_percent == pytest.approx(right.val_top1_percent, abs=1)
    records = [Record.load(tmp_path / f"run{n}" / "results.json") for n in (1, 2)]
    assert [record.num_processes for record in records] == [1, 2]
    assert {record.test_images for record in records} == {599}
    assert all(record.peak_memory_mib > 100 and record.step_ms > 0 for record in records)
    for name in ("run1", "run2"):  # every image once, whatever the number of processes
        with (tmp_path / name / "per_class.csv").open() as file:
            classes = list(csv.DictReader(file))
        assert sum(int(row["images"]) for row in classes) == 599
        right = sum(int(row["correct"]) for row in classes)
        assert 100 * right / 599 == pytest.approx(
            Record.load(tmp_path / name / "results.json").test_top1_percent, abs=1e-3
        )
    assert records[0].test_loss == pytest.approx(records[1].test_loss, abs=2e-4)
    weights = [
        load_file(tmp_path / name / "last" / "model.safetensors") for name in ("run1", "run2")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_random_features_are_the_same_on_all_processes(tmp_path):
    script = tmp_path / "features.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate.utils import gather_object\n"
        "from timm_xformers.recipe import Recipe\n"
        "from timm_xformers.training.session import open_session\n"
        "torch.manual_seed(int(__import__('os').environ['RANK']))\n"
        "session = open_session(Recipe(model='ccp_2_3x2_32', trackers=[]))\n"
        "found = [b for n, b in session.trainer.model.named_buffers() if 'features' in n]\n"
        "both = gather_object([[b.tolist() for b in found]])\n"
        "assert found and both[0] == both[1]\n"
        "assert len(found) == 2\n"
        "print('same')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    stdout, _ = run_all([[*launcher, "--nproc_per_node=2", str(script)]], tmp_path)
    assert stdout.count("same") == 2


@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_go_on_exactly(tmp_path):
    command = launch(2, "--batch-size=16", "--epochs=4", "--num-processes=2", "--set=mixup=0.2")
    whole = subprocess.run([*command, "--output=whole"], cwd=tmp_path, env=ENV, check=False)
    assert whole.returncode == 0
    process = subprocess.Popen([*command, "--output=cut"], cwd=tmp_path, env=ENV)
    log = tmp_path / "cut" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and "epoch 1/4" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not (tmp_path / "cut" / "results.json").exists()
    resumed = subprocess.run(
        [*launch(2)[: -len(COMMON) + 1], "--resume=cut"], cwd=tmp_path, env=ENV, check=False
    )
    assert resumed.returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_interrupt_signal_ends_with_130_and_can_be_resumed(tmp_path):
    command = launch(1, "--output=run", "--epochs=500")
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and "epoch 3/500" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"last holds the state (after|in) epoch \d+", said)
    progression = open_last(tmp_path / "run" / "last").progression
    assert len(read_history(tmp_path / "run" / "results.csv")) == progression.epoch


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_end_alike():
    # A process of its own: it forks, which a process whose tests have had threads must not.
    script = str(Path(__file__).with_name("kill_trials.py"))
    result = subprocess.run(
        [sys.executable, script, "--trials=6", "--seed=1"],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout + result.stderr
