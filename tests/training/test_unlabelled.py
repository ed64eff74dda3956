"""Pictures without labels: a teacher says what is right, and no figure is called accuracy."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

from timm_xformers.cli import main
from timm_xformers.data.data import open_data
from timm_xformers.errors import UsageError, UserError
from timm_xformers.predicting.evaluate import evaluate
from timm_xformers.publishing.publish import publish
from timm_xformers.recipe import Recipe, load_recipe
from timm_xformers.records.headline import AGREEMENT
from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record
from timm_xformers.training.session import open_session
from timm_xformers.training.train import train

TEACHER = "vix_softmax.digits"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures with and without folders, in a part for training and one for the test."""
    root = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(load_digits().images[:80]):
        place = root / ("test" if number >= 60 else "train") / ("more" if number % 3 else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(image * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def settings(pictures):
    """Of a repair of one block by these pictures; keywords of `Recipe`."""
    return {
        "model": TEACHER,
        "teacher": TEACHER,
        "replace": {"mechanism": "performer_softmax_m16", "blocks": "1"},
        "data": "folder",
        "data_dir": str(pictures),
        "labels": "none",
        "val_fraction": 0.2,
        "epochs": 2,
        "align_epochs": 1,
        "batch_size": 16,
        "warmup_epochs": 0.0,
        "trackers": [],
    }


@pytest.fixture(scope="module")
def repaired(settings, tmp_path_factory):
    """A finished run and its record."""
    folder = tmp_path_factory.mktemp("repaired") / "run"
    return train(Recipe(**settings, mixup=0.1, output=str(folder)))


def test_all_pictures_are_found_in_whatever_folder(settings):
    data = open_data(Recipe(**settings, num_classes=10))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 48,
        "val": 12,
        "test": 20,
    }
    assert data.unlabelled
    assert data.num_classes == 10


def test_the_figures_are_agreement_and_nothing_else(repaired, settings):
    folder, record = repaired
    assert record.headline is AGREEMENT
    assert record.test_top1_percent is record.val_top1_percent is None
    assert record.test_teacher_top1_percent is None
    ends = record.test_agreement_interval_percent
    assert ends[0] <= record.test_agreement_percent <= ends[1]
    student = timm.create_model(f"local-dir:{folder.best}", pretrained=True).eval()
    teacher = timm.create_model(TEACHER, pretrained=True).eval()
    session = open_session(Recipe(**settings))
    images = torch.cat([images for images, _ in session.opened("test").batches([torch.arange(20)])])
    with torch.no_grad():
        found, wanted = student(images).double(), teacher(images).double()
    agreed = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    assert record.test_agreement_percent == pytest.approx(100 * float(agreed))
    loss = F.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert record.test_loss == pytest.approx(float(loss), rel=1e-3)


def test_history_and_log_say_agreement(repaired):
    folder, _ = repaired
    aligned, whole = read_history(folder.history)
    assert aligned.right_percent is None
    assert 0 <= whole.train_agreement_percent <= 100
    assert {whole.train_top1_percent, whole.val_top1_percent, whole.val_top5_percent} == {None}
    assert "top" not in folder.history.read_text().splitlines()[0]
    log = folder.log.read_text()
    assert "agreement" in log
    assert "top-1" not in log
    assert not folder.confusion.exists()


def test_weights_know_the_teachers_classes(repaired):
    config = json.loads((repaired[0].best / "config.json").read_text())
    assert config["label_names"] == list("0123456789")


def test_evaluate_asks_the_teacher_again(repaired, capsys):
    folder, record = repaired
    main(["evaluate", str(folder.root), "--json"])
    again = Record(**json.loads(capsys.readouterr().out))
    assert again.test_agreement_percent == record.test_agreement_percent
    assert again.teacher == record.teacher


def test_convert_report_and_publish_say_agreement(repaired, tmp_path, capsys):
    folder, record = repaired
    main(["convert", str(folder.root), "--output", str(tmp_path / "half")])
    main(["report", str(folder.root), "--output", str(tmp_path / "report")])
    table = (tmp_path / "report" / "report.md").read_text()
    assert "agreement %" in table
    assert "top-1 %" not in table
    capsys.readouterr()
    publish(folder.root, "someone/somewhere", dry_run=True)
    text = capsys.readouterr().out
    assert "so accuracy was not measured" in text
    assert "metric" in text
    assert "type: accuracy" not in text
    assert f"{record.test_agreement_percent:.2f} % of the test images get the teacher's" in text


def test_analyse_measures_no_accuracy(pictures, tmp_path, capsys):
    main(
        [
            *("analyse", TEACHER, "--data", "folder", "--data-dir", str(pictures)),
            *("--labels", "none", "--mechanisms", "nystrom_l16", "--images", "8"),
            *("--rounds", "1", "--limit-seconds", "1", "--output", str(tmp_path / "a")),
        ]
    )
    entries = json.loads((tmp_path / "a" / "analysis.json").read_text())["whole"]
    assert {entry["top1_percent"] for entry in entries} == {None}
    assert "no labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_loss": {"labels": 1}}, "teacher_loss gives the labels a weight"),
        ({"classes": ["a", "b"]}, "classes goes by labels"),
    ],
)
def test_settings_that_need_labels_are_refused(settings, changes, words):
    with pytest.raises(UsageError, match=words):
        Recipe(**settings | changes)


def test_nothing_can_be_learnt_without_a_teacher(settings):
    alone = {"teacher": None, "align_epochs": 0, "replace": {}}
    with pytest.raises(UsageError, match="nothing to learn but from a teacher"):
        open_session(Recipe(**settings | alone))


def test_evaluate_without_a_teacher_asks_for_labels(settings):
    recipe = Recipe(model=TEACHER, data="folder", data_dir=settings["data_dir"], labels="none")
    with pytest.raises(UsageError, match="no labels, by which a model could be judged"):
        evaluate(recipe)


def test_known_data_has_labels():
    with pytest.raises(UsageError, match="labels=none is for folders of images"):
        open_data(Recipe(data="digits", labels="none"))


def test_messages_about_classes_name_the_way_without(settings, tmp_path):
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    Image.new("L", (8, 8)).save(flat / "a.png")
    with pytest.raises(UserError, match="--labels none"):
        open_data(Recipe(data="folder", data_dir=str(flat)))
    for name in ("a", "b", "c"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(12):
            noise = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "classes" / name / f"{number}.png")
    other = settings | {"data_dir": str(tmp_path / "classes"), "labels": None, "test_split": "none"}
    with pytest.raises(UsageError, match="learn from the pictures alone by --labels none"):
        open_session(Recipe(**other))


def test_recipe_of_the_run_holds_the_setting(repaired):
    assert load_recipe(str(repaired[0].recipe), {}).labels == "none"
    assert dataclasses.asdict(Recipe())["labels"] is None
