"""Several classes a picture, from the label file to what every command says of the run."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional as F

import timm_xformers.training.session as session_module
from timm_xformers.cli import main
from timm_xformers.data.data import open_data
from timm_xformers.errors import UsageError, UserError
from timm_xformers.predicting.predict import predict
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_csv import read_history
from timm_xformers.records.results_json import Record, split_fields
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.metrics import evaluate_model
from timm_xformers.training.optim import make_criterion, make_mixup
from timm_xformers.training.train import resume, train

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Grey pictures with a stripe of red, green and blue, each there or not, and their labels."""
    root = tmp_path_factory.mktemp("marked")
    rng = np.random.default_rng(0)
    lines, columns = ["id,tags"], ["id,red,green,blue"]
    for part, count in (("train", 96), ("test", 24)):
        (root / part).mkdir()
        for number in range(count):
            marks = rng.integers(0, 2, 3)
            pixels = rng.normal(60, 10, (12, 12, 3))
            for c in marks.nonzero()[0]:
                pixels[4 * c : 4 * c + 4, :, c] += 150
            name = f"{part}{number}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / f"{name}.png")
            lines.append(f"{name},{' '.join(NAMES[c] for c in marks.nonzero()[0])}")
            columns.append(f"{name},{','.join(map(str, marks))}")
    (root / "list.csv").write_text("\n".join(lines))
    (root / "columns.csv").write_text("\n".join(columns))
    return root


def recipe_for(marked, **values):
    return Recipe(
        **{
            "model": "vit_tiny_patch16_224",
            "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "data": "folder",
            "data_dir": str(marked),
            "labels": "list.csv",
            "multi_label": True,
            "loss": "bce",
            "img_size": 12,
            "batch_size": 8,
            "epochs": 10,
            "val_fraction": 0.25,
            "lr": 5e-3,
            "trackers": [],
            "num_workers": 0,
        }
        | values
    )


@pytest.fixture(scope="module")
def run(marked, tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "run"
    folder, record = train(recipe_for(marked, output=str(root)))
    return SimpleNamespace(folder=folder, record=record, root=root)


def test_marks_are_learned_and_every_file_says_map(run):
    record, rows = run.record, read_history(run.folder.history)
    assert record.test_map_percent > 95
    assert record.test_f1_macro_percent > 80
    assert record.val_map_percent == pytest.approx(
        rows[record.best_epoch - 1].val_map_percent, 1e-4
    )
    best = max((row.val_map_percent, -row.val_loss, -row.epoch) for row in rows)
    assert record.best_epoch == -best[2]
    assert Record.load(run.folder.record) == record
    for name, value in dataclasses.asdict(record).items():
        assert value is None or "top1" not in name, name
    for path in (run.folder.history, run.folder.per_class, run.folder.log):
        text = path.read_text()
        assert not re.search("top.?[15]", text), path
    assert "validation mAP" in run.folder.log.read_text()
    assert "3 classes (blue, green, red)" in run.folder.log.read_text()
    assert not run.folder.confusion.exists()
    head, *classes = run.folder.per_class.read_text().splitlines()
    assert head.startswith("label,class_name,images,average_precision_percent")
    precision = [float(line.split(",")[3]) for line in classes]
    assert np.mean(precision) == pytest.approx(record.test_map_percent, abs=0.01)


def test_the_weights_say_what_they_are_to_timm_and_to_transformers(run):
    config = json.loads((run.folder.best / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    model = timm.create_model(f"local-dir:{run.folder.best}", pretrained=True)
    assert "multi_label_classification" in model.pretrained_cfg["notes"]


def test_transformers_takes_the_sigmoid(run, marked):
    transformers = pytest.importorskip("transformers")
    classify = transformers.pipeline("image-classification", str(run.folder.best), device="cpu")
    picture = str(marked / "test" / "test0.png")
    theirs = {each["label"]: each["score"] for each in classify(picture)}
    (ours,) = predict(str(run.folder.best), [picture])
    ours = {guess.name: guess.probability for guess in ours.classes}
    assert theirs == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("labels", [None, "list.csv", "columns.csv"])
def test_evaluate_knows_the_weights_and_goes_by_names(run, marked, labels, capsys):
    asked = [] if labels is None else ["--data-dir", str(marked), "--labels", labels]
    main(["evaluate", str(run.root), *asked, "--set", "num_workers=0", "--details", "more"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    for name in ("test_map_percent", "test_f1_micro_percent", "test_f1_macro_percent", "test_loss"):
        assert found[name] == pytest.approx(getattr(run.record, name), rel=1e-4)
    assert f"test: mAP {run.record.test_map_percent:.2f} %, F1 micro" in said.err
    assert "top-" not in said.err


def test_predict_gives_every_class_and_marks_those_from_a_half(run, marked, capsys):
    picture = str(marked / "test" / "test0.png")
    main(["predict", str(run.root), picture, "--json"])
    (answer,) = json.loads(capsys.readouterr().out)
    truth = (marked / "list.csv").read_text().partition("test0,")[2].split("\n")[0].split()
    assert len(answer["classes"]) == 3
    assert {each["name"] for each in answer["classes"] if each["present"]} == {*truth}
    for each in answer["classes"]:
        assert each["present"] == (each["probability"] >= 0.5)
    main(["predict", str(run.root), picture, "--top-k", "2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2
    assert all(re.search(r" %  (yes|no ) +(red|green|blue)$", line) for line in lines)
    (found,) = predict(str(run.folder.best), [picture])
    assert sum(guess.probability for guess in found.classes) != pytest.approx(1, abs=1e-3)


def test_convert_export_report_and_the_card_carry_it_on(run, marked, capsys):
    main(["convert", str(run.root), "--output", "half"])
    assert f"{run.record.test_map_percent:.2f} % as trained" in capsys.readouterr().out
    main(["export", "local-dir:half", "--output", "again"])
    main(["evaluate", "again", "--data-dir", str(marked), "--labels", "columns.csv", "--json"])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["test_map_percent"] > 95
    main(["report", str(run.root), "--output", "compared"])
    page = Path("compared/report.md").read_text()
    assert f"| {run.record.test_map_percent:.2f} |" in page
    assert "test mAP %" in page
    assert "top-1" not in page
    main(["publish", str(run.root), "someone/marks", "--dry-run"])
    card = capsys.readouterr().out
    assert "name: Mean average precision, %" in card
    assert "multi-label" in card
    assert "sigmoid" in card
    assert not re.search("top-[15]|Wilson|accuracy, %", card, re.IGNORECASE)


def test_a_resumed_run_ends_as_the_undisturbed_one(run, marked, monkeypatch):
    original, calls = session_module.evaluate_model, iter(range(100))

    def stop(*args):
        if next(calls) == 3:  # once
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(session_module, "evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe_for(marked, output="stopped"))
    folder, record = resume(Path("stopped"))
    assert record.test_loss == run.record.test_loss
    weights = [(root / "model.safetensors").read_bytes() for root in (folder.best, run.folder.best)]
    assert weights[0] == weights[1]


def test_labels_of_the_other_kind_are_never_read_in_silence(run, marked):
    with pytest.raises(UserError, match="multi_label=true loss=bce alone"):
        open_data(recipe_for(marked, labels="columns.csv", multi_label=False))
    with pytest.raises(UsageError, match="is read from a label file"):
        open_data(recipe_for(marked, labels=None))
    with pytest.raises(UsageError, match="is read from a label file"):
        open_data(Recipe(multi_label=True, loss="bce"))
    with pytest.raises(UserError, match="num_classes=5 was asked for"):
        open_data(recipe_for(marked, num_classes=5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": "cross_entropy"}, "use loss=bce"),
        ({"classes": ["red", "blue"]}, "leave columns out of the label file"),
        ({"teacher": "vit_tiny_patch16_224.augreg_in21k"}, "matched by softmax"),
    ],
)
def test_settings_for_one_class_an_image_are_refused(marked, values, words):
    with pytest.raises(UsageError, match=words):
        recipe_for(marked, **values)


def test_commands_for_one_class_an_image_refuse_these_weights(run, marked, capsys):
    data = ["--data-dir", str(marked), "--labels", "list.csv"]
    several = ["--set", "multi_label=true", "loss=bce", "num_workers=0"]
    Path("space.yaml").write_text("grid: {lr: [0.1, 0.2]}\nfolds: 2\n")
    for words, command in (
        ("analyse compares models of one", ["analyse", str(run.root), "--mechanisms", "softmax"]),
        ("teachers are matched by softmax", ["train", "--set", f"teacher={run.folder.best}"]),
        ("select deals images out", ["select", *data, *several, "--space", "space.yaml"]),
        ("gives an image one class", ["evaluate", "ccp.mnist", *data, *several]),
    ):
        assert main(command) in (1, 2)
        assert words in capsys.readouterr().err, command


class Scores(torch.nn.Module):
    """Logits that an image holds in its first row of pixels."""

    def forward(self, images):
        return images[:, 0, 0]


class Batched:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def batches(self, order, epoch=0):
        for rows in order:
            yield self.images[rows], self.labels[rows]


def test_figures_are_scikit_learns_over_the_classes_that_are_there():
    rng = np.random.default_rng(0)
    marks = (rng.random((50, 5)) < 0.3).astype(float)
    marks[:, 3] = 0  # no image has it, and its false marks count in F1 micro alone
    logits = rng.normal(0, 2, (50, 5)).round(1)  # with ties
    images = torch.tensor(logits)[:, None, None].float()
    data = Batched(images, torch.tensor(marks).float())
    metrics = evaluate_model(Scores(), data, 8, make_accelerator("no"))
    there, exact = [0, 1, 2, 4], logits.astype(np.float32).astype(float)
    wanted = {
        "map": average_precision_score(marks[:, there], exact[:, there], average="macro"),
        "f1_macro": f1_score(marks[:, there], exact[:, there] >= 0, average="macro"),
        "f1_micro": f1_score(marks, exact >= 0, average="micro"),
    }
    assert metrics.percents == pytest.approx({k: 100 * v for k, v in wanted.items()}, rel=1e-12)
    loss = F.binary_cross_entropy_with_logits(torch.tensor(exact), torch.tensor(marks))
    assert metrics.loss == pytest.approx(float(loss), rel=1e-6)
    assert metrics.score == metrics.percents["map"]
    fields = split_fields("test", metrics)
    assert fields["test_map_percent"] == round(100 * wanted["map"], 4)
    assert not any("top1" in name for name in fields)
    images[0] = torch.nan
    assert np.isnan(evaluate_model(Scores(), data, 8, make_accelerator("no")).score)


def test_smoothing_weights_and_mixing_of_marks(marked):
    marks = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def loss(**values):
        return make_criterion(recipe_for(marked, **values), marks, NAMES, 3)(logits, marks)

    def wanted(targets, weight):
        weight = torch.tensor(weight)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)

    torch.testing.assert_close(loss(), wanted(marks, [1.0, 1, 1]))
    torch.testing.assert_close(loss(smoothing=0.2), wanted(0.8 * marks + 0.1, [1.0, 1, 1]))
    torch.testing.assert_close(loss(class_weights="balanced"), wanted(marks, [1.0, 3, 1 / 3]))
    torch.testing.assert_close(loss(class_weights={"green": 5}), wanted(marks, [1.0, 5, 1]))
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2).clone()
    np.random.seed(0)
    mixed, targets = make_mixup(recipe_for(marked, mixup=1.0), 3)(images, marks)
    share = (mixed[0, 0, 0, 0] - 3) / (0 - 3)  # of the first image, whose partner is the last
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * marks + (1 - share) * marks.flip(0))


def test_a_study_refuses_it(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "recipe: {multi_label: true, loss: bce}\ndata: digits\nseeds: [0]\nbaseline: a\n"
        "arms: [{name: a, model: vix_softmax}]\n"
    )
    from timm_xformers.studies.running.definition import load_study

    with pytest.raises(UsageError, match="a study compares top-1"):
        load_study(tmp_path / "study.yaml")


def test_a_setting_that_came_later_leaves_old_hashes_alone():
    assert Recipe(multi_label=False).digest == Recipe().digest
    several = Recipe(multi_label=True, loss="bce")
    assert several.digest != Recipe(loss="bce").digest
