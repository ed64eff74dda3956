"""Whole runs: what they leave behind, how they stop, and how they go on."""

import csv
import dataclasses
import io
import json
import resource
import shutil
import sys

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.predicting.evaluate import evaluate
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record
from timm_xformers.training import session as session_module
from timm_xformers.training.checkpoint import write_folder
from timm_xformers.training.devices import emulation_note
from timm_xformers.training.loop import EpochSums, _LossWatch
from timm_xformers.training.train import resume, train

from .test_resume import BUSY, assert_same_run


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def interrupt(monkeypatch):
    """Raise an exception in place of the evaluation that ends a given epoch."""

    def at(epoch, error=KeyboardInterrupt):
        calls = iter(range(1, 1000))
        original = session_module.evaluate_model

        def stop(*args):
            if next(calls) == epoch:
                raise error
            return original(*args)

        monkeypatch.setattr(session_module, "evaluate_model", stop)

    return at


def test_a_run_learns_and_leaves_its_results(tiny, capsys):
    settings = {"epochs": 6, "output": "run", "smoothing": 0.1, "limit": None}
    folder, record = train(tiny(**settings))

    names = {path.name for path in folder.root.iterdir()}
    assert names == {
        "recipe.yaml", "results.csv", "results.json", "curves.png", "log.txt", "best", "last",
        "confusion.png", "per_class.csv",
    }  # fmt: skip
    assert record.test_top1_percent > 60
    assert Record.load(folder.record) == record
    assert load_recipe(str(folder.recipe), {}) == tiny(**settings)

    rows = read_history(folder.history)
    best = max(rows, key=lambda row: (row.val_top1_percent, -row.val_loss))
    assert [row.epoch for row in rows] == list(range(1, 7))
    assert record.best_epoch == best.epoch
    assert record.val_top1_percent == round(best.val_top1_percent, 4)
    assert record.val_images == 120
    assert rows[-1].train_loss < rows[0].train_loss
    updates = 6 * (1078 // 64)
    assert record.step_ms == pytest.approx(1000 * record.seconds / updates, rel=0.02)
    assert record.peak_memory_mib > 100
    low, high = record.test_top1_interval_percent
    assert low < record.test_top1_percent < high
    assert folder.curves.read_bytes().startswith(b"\x89PNG")

    said = capsys.readouterr().err
    assert said.count("epoch ") == 7  # one line each, and the best one in the summary
    assert "epoch 6/6" in folder.log.read_text()
    assert {"timm", "torch", "python"} <= record.versions.keys()


def test_best_opens_with_timm_and_carries_its_preprocessing(tiny):
    folder, _ = train(tiny(output="run"))
    config = json.loads((folder.best / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder.best}", pretrained=True)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert tuple(model.pretrained_cfg["mean"]) == (0.3047,)
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 8, 8)
    assert config["label_names"] == list("0123456789")
    for name, value in weights(folder.best).items():
        assert torch.equal(model.state_dict()[name], value)


def test_evaluation_repeats_the_figures_of_training(tiny):
    folder, record = train(tiny(output="run", model_ema_decay=0.8))
    recipe = Recipe(model=f"local-dir:{folder.best}")
    for split in ("test", "val"):
        again = dataclasses.asdict(evaluate(recipe, split))
        before = dataclasses.asdict(record)
        fields = [name for name in again if name.startswith(f"{split}_")]
        assert len(fields) == 11  # six of them empty: no teacher, and one class an image
        assert {name: again[name] for name in fields} == {name: before[name] for name in fields}


def test_checkpoint_file_of_a_named_model(tiny):
    folder, record = train(tiny(output="run"))
    kwargs = tiny().model_kwargs
    recipe = Recipe(model="vit_tiny_patch16_224", model_kwargs=kwargs)
    again = evaluate(recipe, "test", folder.best / "model.safetensors")
    assert again.test_top1_percent == record.test_top1_percent
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(recipe, "test", folder.best / "absent.safetensors")


@pytest.mark.parametrize("stopped_in", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_resumed_run_equals_the_undisturbed_one(tiny, interrupt, stopped_in):
    settings = {**BUSY, "epochs": 3}
    undisturbed, record = train(tiny(output="whole", **settings))
    interrupt(stopped_in)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(output="cut", **settings))
    assert not (undisturbed.root.parent / "cut" / "results.json").exists()

    torch.rand(7)  # whatever happened in between
    folder, resumed = resume(undisturbed.root.parent / "cut")

    assert_same_run(undisturbed.root, folder.root)
    assert resumed.test_loss == record.test_loss
    assert resumed.best_epoch == record.best_epoch


def test_interruption_keeps_last_and_says_so(tiny, interrupt, tmp_path, capsys):
    interrupt(2)
    tiny(output="run").save(tmp_path / "r.yaml")
    assert main(["train", "--recipe", "r.yaml"]) == 130
    said = capsys.readouterr().err
    assert "run/last holds the state after epoch 1" in said
    assert "--resume run" in said
    assert main(["train", "--resume", "run", "--set", "num_workers=0"]) == 0
    assert "Results are in run" in capsys.readouterr().out


def test_lost_rename_is_survived(tiny, interrupt, tmp_path):
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(output="run"))
    shutil.rmtree(tmp_path / "run" / "last.previous")
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "last.previous")
    folder, _ = resume(tmp_path / "run")
    assert len(read_history(folder.history)) == 2


def test_diverging_run_stops_and_keeps_the_best(tiny, tmp_path):
    recipe = tiny(
        output="run",
        limit=None,
        opt="sgd",
        sched="multistep",
        sched_kwargs={"decay_milestones": [1.5], "decay_rate": 1e30},
        warmup_epochs=0.0,
    )
    with pytest.raises(UserError, match=r"loss became (nan|inf) in epoch 2, step \d+ of 16"):
        train(recipe)
    model = timm.create_model("local-dir:run/best", pretrained=True)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert len(read_history(tmp_path / "run" / "results.csv")) == 1


def test_without_validation_the_last_epoch_is_kept(tiny):
    folder, record = train(tiny(output="run", val_fraction=0.0))
    assert record.best_epoch == 2
    assert record.val_top1_percent is None
    assert record.test_top1_percent is not None
    assert_same_weights(folder.best, folder.last)
    with folder.history.open() as file:
        assert {row["val_loss"] for row in csv.DictReader(file)} == {""}


def test_default_folders_are_numbered(tiny):
    names = [train(tiny(epochs=1))[0].root.as_posix() for _ in range(2)]
    assert names == ["runs/vit_tiny_patch16_224-digits-1", "runs/vit_tiny_patch16_224-digits-2"]


def test_folder_that_holds_something_is_refused(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"run is not empty; choose another --output"):
        train(tiny(output="run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_resume_needs_an_unfinished_run(tiny, tmp_path):
    folder, _ = train(tiny(output="run"))
    with pytest.raises(UserError, match="is finished"):
        resume(folder.root)
    with pytest.raises(UserError, match="holds no run"):
        resume(tmp_path)


def test_other_number_of_processes_is_refused(tiny, interrupt, tmp_path, monkeypatch):
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(output="run"))
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    with pytest.raises(UserError, match="1 processes, and these are 4"):
        resume(tmp_path / "run")


def test_number_of_processes_that_was_asked_for_is_held(tiny):
    train(tiny(output="one", epochs=1, num_processes=1))
    with pytest.raises(UsageError, match=r"num_processes=2 was asked for and 1 joined; start"):
        train(tiny(output="two", num_processes=2))


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_emulated_bf16_is_said(tiny, monkeypatch, capsys, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    train(tiny(output="run", epochs=1, mixed_precision="bf16"))
    assert ("has no bf16 instructions" in capsys.readouterr().err) == warned
    assert emulation_note("no", torch.device("cpu")) is None


def test_full_disk_leaves_the_previous_folder(tmp_path):
    target = tmp_path / "last"
    with write_folder(target) as fresh:
        (fresh / "weights").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(UserError, match=r"Cannot write .*last"), write_folder(target) as fresh:
            (fresh / "weights").write_bytes(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert (target / "weights").read_bytes() == b"old"


def test_full_disk_under_safetensors_is_a_sentence(tmp_path):
    weights = {"w": torch.zeros(10_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with (
            pytest.raises(UserError, match=r"Cannot write .*last: .*File too large"),
            write_folder(tmp_path / "last") as fresh,
        ):
            save_file(weights, fresh / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_images_trains(tiny, image_folder):
    recipe = tiny(
        data="folder",
        data_dir=str(image_folder),
        img_size=16,
        batch_size=4,
        epochs=4,
        num_workers=0,
        val_fraction=0.25,
        output="run",
    )
    folder, record = train(recipe)
    assert record.test_top1_percent == 100
    config = json.loads((folder.best / "config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    assert (record.img_size, record.in_chans, record.num_classes) == (16, 3, 2)


def test_fine_tuning_starts_from_published_weights(tiny):
    folder, _ = train(tiny(output="first", epochs=4))
    name = f"local-dir:{folder.best}"
    recipe = tiny(model=name, model_kwargs={}, pretrained=True, epochs=1, lr=1e-6, output="second")
    _, tuned = train(recipe)
    assert tuned.val_top1_percent == pytest.approx(
        Record.load(folder.record).val_top1_percent, abs=2
    )


def test_progress_bar_on_a_terminal(tiny, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("timm_xformers.training.loop.REPORT_SECONDS", 0.0)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    train(tiny(output="run", limit=None))
    text = screen.getvalue()
    assert "epoch 2/2" in text
    assert "images/s" in text
    assert "top-1" in text
    assert "/32 [" in text  # steps of the whole run


def test_mixed_images_count_by_their_heavier_label():
    watch = _LossWatch(epoch=1, num_batches=1, sums=EpochSums())
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    watch.add(torch.tensor(0.5), logits, torch.tensor([[0.3, 0.7], [0.4, 0.6]]))
    assert watch.read() == (0.5, 50.0)
    watch.add(torch.tensor(1.5), logits, torch.tensor([0, 1]))
    assert watch.read() == (1.0, 75.0)
