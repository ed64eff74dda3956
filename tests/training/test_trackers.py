"""Trackers get every figure, and can never end a run."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from timm_xformers.cli import main
from timm_xformers.records.results_csv import EpochRow, read_history
from timm_xformers.training import session as session_module
from timm_xformers.training import train as train_module
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.trackers import Trackers, tracker_names
from timm_xformers.training.train import resume, train


def scalars(folder):
    """Tag -> [(step, value), ...] of a folder of TensorBoard, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


class Recorder(GeneralTracker):
    """Keeps what it gets, and fails where it is told to."""

    name = "tensorboard"
    requires_logging_directory = False
    fails_in = ""
    got: list  # of each test's own

    def __init__(self, project, *args, **kwargs):
        super().__init__()
        self._do("init", project)

    def start(self):
        pass  # later versions of accelerate call it

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self._do("config", values)

    def log(self, values, step=None, **kwargs):
        self._do(f"log {step}", values)

    def finish(self):
        self._do("finish", None)

    def _do(self, what, values):
        if what == type(self).fails_in:
            raise OSError("no\nroute to host")
        type(self).got.append((what, values))


@pytest.fixture
def recorder(monkeypatch):
    cls = type("Recorder", (Recorder,), {"got": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", cls)
    return cls


@pytest.fixture
def trackers(tiny, tmp_path):
    """Open the trackers of a recipe; what they say is kept in ``said``."""
    said = []

    def open_them(names, **settings):
        recipe = tiny(**settings)
        opened = Trackers(
            names, make_accelerator("no"), recipe, tmp_path / "run", done_epochs=0, say=said.append
        )
        return opened, said

    return open_them


ROW = EpochRow(1, 1e-3, 2.0, 10.0, None, None, None, 0.5, 100, 0.01)


def test_tensorboard_shows_every_epoch_and_the_record_of_a_resumed_run(tiny, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "geheim-0815")
    original = session_module.evaluate_model
    calls = iter(range(1, 100))

    def stop(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(session_module, "evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(output="run", epochs=3, trackers=None))
    folder, record = resume(Path("run"))
    board = folder.root / "tensorboard"
    assert len(list(board.glob("events*"))) == 2
    assert len(list(board.rglob("hparams.yml"))) == 1

    found, rows = scalars(board), read_history(folder.history)
    assert [row.epoch for row in rows] == [1, 2, 3]
    for tag, name in (
        ("train/loss", "train_loss"),
        ("train/top1_percent", "train_top1_percent"),
        ("train/lr", "lr"),
        ("val/loss", "val_loss"),
        ("val/top1_percent", "val_top1_percent"),
    ):
        assert found[tag] == [(r.epoch, pytest.approx(getattr(r, name), rel=1e-5)) for r in rows]
    speed = [(r.epoch, pytest.approx(r.train_images / r.train_seconds, rel=1e-5)) for r in rows]
    assert found["train/images_per_s"] == speed
    assert found["result/test_top1_percent"] == [(3, pytest.approx(record.test_top1_percent))]
    low = record.test_top1_interval_percent[0]
    assert found["result/test_top1_interval_percent_low"] == [(3, pytest.approx(low))]
    written = b"".join(p.read_bytes() for p in folder.root.rglob("*") if p.is_file())
    assert b"geheim" not in written


def test_epochs_that_are_trained_again_hide_what_was_there(tiny, tmp_path):
    for loss, done in ((2.0, 0), (1.0, 1)):  # killed after the row was sent, before it was saved
        with Trackers(
            ["tensorboard"],
            make_accelerator("no"),
            tiny(),
            tmp_path,
            done_epochs=done,
            say=pytest.fail,
        ) as opened:
            for epoch in range(done + 1, 3):
                opened.log_epoch(dataclasses.replace(ROW, epoch=epoch, train_loss=loss))
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 2.0), (2, 1.0)]


def test_settings_are_sent_without_places(recorder, trackers):
    opened, said = trackers(["tensorboard"], output="x", data_dir="/home/somebody")
    with opened:
        opened.log_epoch(ROW)
    (_, project), (_, config), (_, epoch), _ = recorder.got
    assert [what for what, _ in recorder.got] == ["init", "config", "log 1", "finish"]
    assert project == "tensorboard"  # the name of its folder
    assert config["lr"] == 3e-3
    assert config["model_kwargs"].startswith("{'patch_size'")
    assert not {"output", "data_dir"} & config.keys()
    assert "somebody" not in str(recorder.got)
    assert set(epoch) == {"train/loss", "train/top1_percent", "train/lr", "train/images_per_s"}
    assert said == []


@pytest.mark.parametrize("where", ["init", "config", "log 1", "finish"])
def test_failing_tracker_costs_one_warning(recorder, trackers, where):
    recorder.fails_in = where
    opened, said = trackers(["tensorboard"])
    with opened:
        opened.log_epoch(ROW)
        opened.log_epoch(ROW)
    assert said == [
        "warning: tensorboard failed and gets nothing more (no route to host); the run goes on."
    ]


def test_failing_tracker_does_not_take_run_and_others_along(tiny, recorder, monkeypatch, capsys):
    other = type("Other", (Recorder,), {"name": "wandb", "got": [], "fails_in": "log 1"})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", other)
    monkeypatch.setattr(train_module, "tracker_names", lambda recipe: ["wandb", "tensorboard"])
    folder, _ = train(tiny(output="run"))
    assert folder.record.exists()
    assert [what for what, _ in other.got] == ["init", "config"]
    assert other.got[0] == ("init", "timm-xformers")
    logged = [what for what, _ in recorder.got]
    assert logged == ["init", "config", "log 1", "log 2", "log 2", "finish"]
    assert folder.log.read_text().count("warning: wandb failed") == 1
    assert capsys.readouterr().err.count("warning: ") == 1


def test_default_is_tensorboard_where_it_is_installed(tiny, monkeypatch):
    assert tracker_names(tiny(trackers=None)) == ["tensorboard"]
    assert tracker_names(tiny(trackers=["tensorboard", "tensorboard"])) == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tracker_names(tiny(trackers=None)) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [("tensorboard", 'pip install "timm-xformers[train]"'), ("wandb", "pip install wandb")],
)
def test_missing_tracker_is_named_before_any_work(name, line, tmp_path, monkeypatch, capsys):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else original(n))
    assert main(["train", "--output", "run", "--set", f"trackers=[{name}]"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert name in said
    assert line in said
    assert list(tmp_path.iterdir()) == []
