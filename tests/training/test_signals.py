"""Signals, terminals that are gone and killed workers: the state is saved, and the end is named."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from timm_xformers.data.loader import LoaderBatches, killed_worker
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import find_damage, write_folder
from timm_xformers.training.run_log import RunLog
from timm_xformers.training.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_schedulers_and_terminals_may_ask_twice(signum):
    before = signal.signal(signum, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        with StopRequest() as request:
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signum, before)
    assert request.signum == signum


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
        assert request.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_line_is_logged_before_it_is_shown_and_a_dead_pipe_is_left_alone(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with RunLog(tmp_path / "log.txt", 10, 0, speaking=True) as log:
            log.say("one")
            log.say("two")
        monkeypatch.undo()
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_a_terminal_that_hangs_up_is_left_alone(tmp_path, monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with RunLog(tmp_path / "log.txt", 10, 0, speaking=True) as log:
            log.say("one")
            os.close(master)
            log.at(1, "epoch 1/1", 0.5, 50.0, 100.0)
            log.say("two")
        monkeypatch.undo()
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


class _Split:
    """Two images whose decoding does what a test wants, in the worker."""

    labels = torch.zeros(2, dtype=torch.long)

    def __init__(self, action):
        self.action = action

    def __len__(self):
        return 2

    def image(self, position):
        self.action()
        return torch.zeros(1, 2, 2, dtype=torch.uint8)


def _batches(action):
    loader = LoaderBatches(
        _Split(action), lambda image: image, mean=(0.0,), std=(1.0,),
        device=torch.device("cpu"), num_workers=1,
    )  # fmt: skip
    return list(loader.batches([torch.arange(2)]))


def _signal_self(signum):
    os.kill(os.getpid(), signum)


def test_workers_leave_the_groups_signals_to_the_training_process():
    def all_signals():
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            _signal_self(signum)

    ((images, _),) = _batches(all_signals)
    assert images.shape == (2, 1, 2, 2)


def test_a_killed_worker_is_named():
    with pytest.raises(UserError, match=r"Decoding process \d+ was killed .* lower num_workers"):
        _batches(lambda: _signal_self(signal.SIGKILL))


def test_a_killed_worker_is_no_full_disk(tmp_path):
    report = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="pid 7") as raised, write_folder(tmp_path / "last"):
        raise report
    assert "Decoding process 7" in str(killed_worker(raised.value))
    assert killed_worker(RuntimeError("out of memory")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_whole_group_is_told_twice_and_the_state_is_saved(image_folder, tmp_path, name):
    command = [
        *(sys.executable, "-m", "timm_xformers", "train", "--model", "vix_mnist_nano"),
        *("--data-dir", str(image_folder), "--img-size", "8", "--epochs", "500"),
        *("--batch-size", "4", "--output", str(tmp_path / "run")),
        *("--set", "in_memory=false", "num_workers=2", "trackers=[]"),
    ]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = Path(tmp_path / "run" / "results.csv")
    while not log.exists() and run.poll() is None:
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(run.pid, getattr(signal, name))
    said = run.communicate()[1]
    assert run.returncode == 128 + getattr(signal, name), said
    assert "holds the state" in said
    assert "Traceback" not in said
    assert find_damage(tmp_path / "run" / "last") is None
