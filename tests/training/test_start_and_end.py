"""Where training starts from, by which loss it goes, and what ends it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.results_csv import read_history
from timm_xformers.training.build import build_model
from timm_xformers.training.defaults import choose_model
from timm_xformers.training.optim import make_criterion
from timm_xformers.training.session import open_session
from timm_xformers.training.train import resume, train

NANO = {"model": "vix_mnist_nano", "img_size": 8, "trackers": [], "limit": 100, "batch_size": 20}


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("vix_softmax.digits", None, "from vix_softmax.digits"),
        ("vix_softmax.digits", False, "random weights"),
        ("vix_softmax", None, "random weights"),
        ("vix_softmax", True, "from vix_softmax.digits"),
    ],
)
def test_a_name_with_weights_starts_from_them(model, pretrained, words):
    session = open_session(Recipe(model=model, pretrained=pretrained, trackers=[]))
    assert session.initial_weights == words
    published, _ = build_model("vix_softmax.digits", pretrained=True, in_chans=1, img_size=8)
    equal = torch.equal(session.trainer.model.head.weight, published.head.weight)
    assert equal == words.startswith("from")


def test_a_run_folder_is_a_model_and_leaves_no_path(finished_run, tmp_path, capsys):
    arguments = ["train", "--model", str(finished_run), "--output", "tuned", "--epochs", "1"]
    assert main([*arguments, "--set", "trackers=[]", "limit=100", "warmup_epochs=0"]) == 0
    assert f"{finished_run}/best, from a local vix_mnist_nano (SHA-256 " in capsys.readouterr().err
    text = (tmp_path / "tuned" / "results.json").read_text()
    assert str(finished_run) not in text
    record = json.loads(text)
    assert record["model"] == "vix_mnist_nano"
    assert record["initial_weights"].startswith("from a local vix_mnist_nano (SHA-256 ")
    assert str(finished_run) not in (tmp_path / "tuned" / "best" / "config.json").read_text()


def test_a_finished_run_says_how_to_train_on(finished_run, capsys):
    assert main(["train", "--resume", str(finished_run)]) == 1
    assert f"timm-xformers train --model {finished_run}" in capsys.readouterr().err
    assert main(["train", "--output", str(finished_run)]) == 2
    said = capsys.readouterr().err
    assert "choose another --output" in said
    assert "--resume" not in said  # which would refuse it


@pytest.mark.parametrize("damage", ["flipped", "cut", "cut and unlisted"])
def test_damaged_weights_are_a_sentence(finished_run, tmp_path, damage):
    folder = tmp_path / "best"
    shutil.copytree(finished_run / "best", folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 64
    weights.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "cut and unlisted":
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        build_model(f"local-dir:{folder}", pretrained=True)


def test_weights_are_as_readable_as_other_files(finished_run):
    modes = {path.stat().st_mode for path in (finished_run / "best").iterdir()}
    assert len(modes) == 1


def test_steps_end_a_run_within_an_epoch_and_the_schedule_with_them(tmp_path):
    _, record = train(Recipe(**NANO, epochs=30, max_steps=7, warmup_epochs=0, output="run"))
    rows = read_history(tmp_path / "run" / "results.csv")
    assert [row.train_images for row in rows] == [100, 40]  # 5 updates to an epoch
    assert rows[-1].lr == pytest.approx(Recipe.min_lr, rel=1e-6)
    assert record.epochs == 2
    assert record.cpu_seconds == pytest.approx(sum(row.cpu_seconds for row in rows), abs=0.02)
    # Epochs are the end where they come first.
    _, record = train(Recipe(**NANO, epochs=1, max_steps=70, warmup_epochs=0, output="short"))
    assert record.epochs == 1


def test_processor_seconds_end_a_run(tmp_path):
    _, record = train(Recipe(**NANO, epochs=5000, max_seconds=0.2, output="run"))
    assert 0.2 <= record.cpu_seconds < 2
    assert record.epochs < 5000
    rows = read_history(tmp_path / "run" / "results.csv")
    assert rows[-1].lr < 0.1 * Recipe.lr


def test_a_budget_that_was_spent_before_a_kill_stays_spent(tmp_path):
    train(Recipe(**NANO, epochs=30, max_steps=7, output="run"))
    (tmp_path / "run" / "results.json").unlink()  # killed before it was written
    _, record = resume(tmp_path / "run")
    assert record.epochs == 2


def test_the_test_set_can_be_left_alone():
    _, record = train(Recipe(**NANO, epochs=1, test_split="none", output="run"))
    assert record.test_images is None
    assert record.val_images


def criterion(labels, names=(), classes=3, **values):
    return make_criterion(dataclasses.replace(Recipe(), **values), labels, names, classes)


def test_losses_against_their_definitions():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2])
    hot = F.one_hot(labels, 3).double()
    p = logits.sigmoid()
    wanted = -(hot * p.log() + (1 - hot) * (1 - p).log()).mean()
    torch.testing.assert_close(criterion(labels, loss="bce")(logits, labels), wanted)
    # Balanced: each class counts the same in all.
    weights = torch.tensor([6 / 9, 6 / 6, 6 / 3], dtype=torch.float64)
    losses = -logits.log_softmax(-1)[torch.arange(6), labels]
    wanted = (weights[labels] * losses).sum() / weights[labels].sum()
    balanced = criterion(labels, class_weights="balanced").double()
    torch.testing.assert_close(balanced(logits, labels), wanted)
    named = criterion(labels, ["cat", "dog", "emu"], class_weights={"dog": 2.0, "2": 3.0})
    assert named.weight.tolist() == [1, 2, 3]
    soft = criterion(labels, class_weights={"0": 2.0}, mixup=0.2).double()
    mixed = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    wanted = -(mixed * torch.tensor([2.0, 1, 1]) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(soft(logits, mixed), wanted)
    with pytest.raises(UsageError, match=r"'cta', which is no class \(nearest: cat"):
        criterion(labels, ["cat", "dog", "emu"], class_weights={"cta": 2.0})


@pytest.mark.parametrize(("side", "size"), [(28, 32), (80, 64), (300, 96)])
def test_ones_own_images_get_a_small_model_with_weights(tmp_path, side, size):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 255, (side, side + 4, 3), dtype="uint8")
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
    own = load_recipe(None, {"data": "folder", "data_dir": str(tmp_path / "d")})
    recipe, reason = choose_model(own, [])
    assert (recipe.model, recipe.img_size) == ("ccn_4_3x2_32.cifar10", size)
    assert recipe.starts_pretrained
    assert f"at {size} pixels, for 18 images of about {side} pixels" in reason
    kept, _ = choose_model(dataclasses.replace(own, epochs=3), ["epochs"])
    assert kept.epochs == 3


def test_auto_augment_that_fails_in_a_worker_is_refused_before(tiny):
    with pytest.raises(UsageError, match="auto_augment='v0' does not work"):
        open_session(tiny(in_memory=False, auto_augment="v0"))
