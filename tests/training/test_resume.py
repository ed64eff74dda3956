"""Runs that are cut anywhere, and go on to the same bits."""

import dataclasses
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from timm_xformers.cli import main
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import find_damage, previous_of, write_folder
from timm_xformers.records.results_csv import read_history
from timm_xformers.training import train as train_module
from timm_xformers.training.checkpoint import open_last
from timm_xformers.training.signals import Stopped, StopRequest
from timm_xformers.training.train import resume, train

# Everything that draws random numbers or keeps a state.
BUSY = {
    "epochs": 2,
    "mixup": 0.2,
    "cutmix": 0.5,
    "smoothing": 0.1,
    "drop_path_rate": 0.2,
    "crop_pad": 1,
    "rotate_degrees": 10.0,
    "re_prob": 0.3,
    "model_ema_decay": 0.9,
    "clip_grad": 1.0,
    "grad_accum_steps": 2,
    "batch_size": 32,
    "limit": 304,  # five updates to an epoch, the last of a single pass
}
TIMES = ("train_seconds", "wait_seconds", "cpu_seconds")
LAST_FILES = ("config.json", "model.safetensors", "progression.json", "results.csv")


def rows_without_times(root):
    return [
        {k: v for k, v in dataclasses.asdict(row).items() if k not in TIMES}
        for row in read_history(root / "results.csv")
    ]


def assert_same_run(one, other):
    """Weights, averages, optimiser and results.csv, bit for bit."""
    assert rows_without_times(one) == rows_without_times(other)
    for part in ("best", "last"):
        left, right = (load_file(root / part / "model.safetensors") for root in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    states = [torch.load(r / "last" / "training_state.pt", weights_only=True) for r in (one, other)]
    assert states[0]["ema"].keys() == states[1]["ema"].keys()
    for name, value in states[0]["ema"].items():
        assert torch.equal(value, states[1]["ema"][name]), name
    left, right = (state["optimizer"]["state"] for state in states)
    for key, entries in left.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key][name]))


@pytest.fixture
def stop_at(monkeypatch):
    """Send a signal to the run after a given number of updates in all."""
    original = train_module._Run._between_updates

    def at(update, signum=signal.SIGTERM):
        def ask(run, so_far, request):
            if run.session.trainer.updates == update:
                signal.raise_signal(signum)
            original(run, so_far, request)

        monkeypatch.setattr(train_module._Run, "_between_updates", ask)

    return at


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Folder of the runs below, which are trained once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def whole(tiny, kept):
    """The busy run undisturbed; not to be changed."""
    if not (kept / "whole").exists():
        train(tiny(output=str(kept / "whole"), **BUSY))
    return kept / "whole"


@pytest.fixture
def cut_run(tiny, stop_at, kept):
    """The busy run stopped in its second epoch; not to be changed."""
    if not (kept / "cut").exists():
        stop_at(8)
        with pytest.raises(Stopped):
            train(tiny(output=str(kept / "cut"), **BUSY))
        stop_at(-1)
    return kept / "cut"


@pytest.mark.parametrize("update", [1, pytest.param(4, marks=pytest.mark.slow), 8])
def test_cut_within_an_epoch_goes_on_exactly(tiny, stop_at, tmp_path, whole, update):
    stop_at(update)
    with pytest.raises(Stopped) as stopped:
        train(tiny(output="cut", **BUSY))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    checkpoint = open_last(tmp_path / "cut" / "last")
    assert checkpoint.progression.updates == update
    torch.rand(7)  # whatever happened in between
    stop_at(-1)
    resume(tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")


def test_filters_in_channels_last_and_muon_go_on_exactly(tiny, stop_at, tmp_path):
    settings = {
        **BUSY,
        "epochs": 1,
        "model": "ccp_2_3x2_32",
        "model_kwargs": {"embed_dim": 32},
        "opt": "muon",
        "channels_last": True,
    }
    train(tiny(output="whole", **settings))
    stop_at(3)
    with pytest.raises(Stopped):
        train(tiny(output="cut", **settings))
    stop_at(-1)
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_tokens_left_out_go_on_exactly(tiny, stop_at, tmp_path):
    settings = {
        **BUSY,
        "patch_drop_rate": 0.5,
        "stages": [{"epoch": 2, "img_size": 16, "patch_drop_rate": 0.75}],
    }
    train(tiny(output="whole", **settings))
    stop_at(8)
    with pytest.raises(Stopped):
        train(tiny(output="cut", **settings))
    torch.rand(7)  # whatever happened in between
    stop_at(-1)
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_cut_at_every_update_goes_on_exactly(tiny, stop_at, tmp_path):
    settings = {**BUSY, "epochs": 1, "limit": 256}
    train(tiny(output="whole", **settings))
    stop_at(1)
    with pytest.raises(Stopped):
        train(tiny(output="cut", **settings))
    for update in range(2, 5):
        stop_at(update)
        if update < 4:  # the fourth is the last of the epoch
            with pytest.raises(Stopped):
                resume(tmp_path / "cut")
        else:
            resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_from_files_and_workers_go_on_exactly(
    tiny, stop_at, tmp_path, image_folder, workers
):
    settings = {
        **{k: v for k, v in BUSY.items() if k not in ("crop_pad", "rotate_degrees")},
        "data": "folder",
        "data_dir": str(image_folder),
        "in_memory": False,
        "img_size": 16,
        "batch_size": 4,
        "auto_augment": "rand-m5-mstd0.5",
        "val_fraction": 0.25,
        "num_workers": workers,
    }
    train(tiny(output="whole", **settings))
    stop_at(1)
    with pytest.raises(Stopped):
        train(tiny(output="cut", **settings))
    stop_at(-1)
    resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_saving_by_the_clock_does_not_change_the_run(tiny, tmp_path, whole):
    train(tiny(output="saved", checkpoint_minutes=1e-9, **BUSY))
    assert_same_run(whole, tmp_path / "saved")


def test_time_decides_when_an_epoch_is_saved(tiny, monkeypatch):
    saved = []
    original = train_module._Run.save
    monkeypatch.setattr(
        train_module._Run, "save", lambda run, *a: (saved.append(a), original(run, *a))[1]
    )
    train(tiny(output="often", checkpoint_minutes=1e-9, batch_size=128))  # 4 updates to an epoch
    often = len(saved)
    train(tiny(output="never", checkpoint_minutes=0.0, batch_size=128))
    assert (often, len(saved) - often) == (1 + 2 * 4, 1 + 2)


def test_signal_ends_the_command_with_its_code_and_says_how_to_go_on(
    tiny, stop_at, tmp_path, capsys
):
    tiny(output="run").save(tmp_path / "r.yaml")
    stop_at(5, signal.SIGINT)
    assert main(["train", "--recipe", "r.yaml"]) == 130
    said = capsys.readouterr().err
    assert "run/last holds the state in epoch 1 after step 5" in said
    assert "timm-xformers train --resume run" in said
    stop_at(9, signal.SIGTERM)
    assert main(["train", "--resume", "run"]) == 143
    assert "Going on in epoch 1 after step 5." in capsys.readouterr().err
    stop_at(-1)
    assert main(["train", "--resume", "run"]) == 0
    assert not (tmp_path / "run" / "last.previous").exists()


def test_second_signal_interrupts_at_once():
    # Shells start background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # as before
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, zero, flip, remove])
@pytest.mark.parametrize("name", [*LAST_FILES, "training_state.pt", "manifest.json"])
def test_every_damage_is_named_and_the_checkpoint_before_is_used(cut_run, tmp_path, name, damage):
    shutil.copytree(cut_run, tmp_path / "run")
    damage(tmp_path / "run" / "last" / name)
    checkpoint = open_last(tmp_path / "run" / "last")
    # A damaged manifest may accuse another file.
    assert name in checkpoint.damaged or name == "manifest.json"
    assert "run/last: " in checkpoint.damaged
    assert checkpoint.progression.place == "after epoch 1"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training_state.pt", truncate),
        ("config.json", remove),
        *(
            pytest.param(name, damage, marks=pytest.mark.slow)
            for name, damage in [
                *(("config.json", damage) for damage in (truncate, empty, zero, flip)),
                *((name, remove) for name in (*LAST_FILES[1:], "training_state.pt")),
                ("manifest.json", remove),
            ]
        ),
    ],
)
def test_runs_go_on_from_the_checkpoint_before_exactly(
    whole, cut_run, tmp_path, capsys, name, damage
):
    shutil.copytree(cut_run, tmp_path / "run")
    damage(tmp_path / "run" / "last" / name)
    capsys.readouterr()
    resume(tmp_path / "run")
    said = capsys.readouterr().err
    assert "Damaged, hence not used: " in said
    assert name in said
    assert "Going on after epoch 1." in said
    assert_same_run(whole, tmp_path / "run")


def test_killed_before_the_first_checkpoint_starts_at_the_beginning(tiny, tmp_path, whole, capsys):
    (tmp_path / "run").mkdir()
    tiny(output="run", **BUSY).save(tmp_path / "run" / "recipe.yaml")
    (tmp_path / "run" / ".txf-0123abcd-last").mkdir()
    (tmp_path / "run" / ".txf-0123abcd-results.json").touch()
    (tmp_path / "run" / "notes.tmp-1").touch()  # the user's own
    resume(tmp_path / "run")
    assert "There is no checkpoint yet" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".txf-*"))
    assert (tmp_path / "run" / "notes.tmp-1").exists()


def test_two_damaged_checkpoints_are_both_named(tiny, stop_at, tmp_path):
    stop_at(5)
    with pytest.raises(Stopped):
        train(tiny(output="run"))
    last = tmp_path / "run" / "last"
    flip(last / "model.safetensors")
    remove(previous_of(last) / "progression.json")
    with pytest.raises(UserError) as error:
        resume(tmp_path / "run")
    assert "last: model.safetensors is not what was written" in str(error.value)
    assert "last.previous: progression.json is missing" in str(error.value)
    assert str(error.value).endswith("start a new run.")


def test_damaged_best_is_named_and_replaced(cut_run, tmp_path, capsys):
    shutil.copytree(cut_run, tmp_path / "run")
    flip(tmp_path / "run" / "best" / "model.safetensors")
    resume(tmp_path / "run")
    assert "best is damaged (model.safetensors is not what was written)" in capsys.readouterr().err
    assert find_damage(tmp_path / "run" / "best") is None


def test_a_crash_between_the_renames_loses_nothing(tmp_path):
    target = tmp_path / "last"
    for content in (b"one", b"two"):
        with write_folder(target, keep_previous=True) as fresh:
            (fresh / "weights").write_bytes(content)
    assert (previous_of(target) / "weights").read_bytes() == b"one"
    shutil.rmtree(previous_of(target))
    target.rename(previous_of(target))  # killed here
    with write_folder(target, keep_previous=True) as fresh:
        (fresh / "weights").write_bytes(b"three")
    assert find_damage(target) is None
    assert (previous_of(target) / "weights").read_bytes() == b"two"
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.previous"}
