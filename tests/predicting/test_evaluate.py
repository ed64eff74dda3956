"""Classes are matched by name, whatever a folder has of them and in which order."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_xformers.cli import main
from timm_xformers.data.classes import alike_names, match_names
from timm_xformers.data.sources import open_source
from timm_xformers.errors import UserError
from timm_xformers.predicting.evaluate import evaluate
from timm_xformers.recipe import Recipe
from timm_xformers.training.train import train

pytestmark = pytest.mark.usefixtures("quick_pictures")

COLOURS = {"blue": 2, "green": 1, "red": 0}


def fill(folder, names, count, kind="png"):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(40, 10, (16, 16, 3))
            pixels[..., COLOURS[name.lower().strip("_ -")]] += 150
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number}.{kind}")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A run that tells three colours apart."""
    root = tmp_path_factory.mktemp("colours")
    fill(root / "old", COLOURS, 20)
    train(
        Recipe(
            model="vit_tiny_patch16_224",
            model_kwargs={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
            data="folder",
            data_dir=str(root / "old"),
            img_size=8,
            batch_size=6,
            epochs=4,
            lr=3e-3,
            trackers=[],
            num_workers=0,
            output=str(root / "run"),
        )
    )
    return root


def top1(colours, folder, split="test", **values):
    recipe = Recipe(model=str(colours / "run"), data="folder", data_dir=str(folder), **values)
    recipe = dataclasses.replace(recipe, model=f"local-dir:{colours / 'run' / 'best'}")
    return evaluate(recipe, split)


@pytest.mark.parametrize(
    "names", [["green", "red"], ["red"], ["blue", "red"], ["Red", "GREEN"], [" red", "green_"]]
)
def test_any_subset_of_the_classes_in_any_spelling(colours, tmp_path, names):
    fill(tmp_path / "new", names, 6)
    record = top1(colours, tmp_path / "new")
    assert (record.test_images, record.num_classes) == (6 * len(names), 3)
    assert record.test_top1_percent == 100.0


def test_parts_and_label_files_are_matched_too(colours, tmp_path):
    fill(tmp_path / "new" / "Test", ["red", "green"], 6)
    assert top1(colours, tmp_path / "new").test_top1_percent == 100.0
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = []
    for path in (tmp_path / "new" / "Test").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
        lines.append(f"{path.parent.name}{path.stem},{path.parent.name}")
    (tmp_path / "l.csv").write_text("\n".join(lines))
    record = top1(colours, flat, labels=str(tmp_path / "l.csv"))
    assert (record.test_images, record.test_top1_percent) == (12, 100.0)


def test_chosen_classes_are_matched_and_not_renumbered(colours, tmp_path):
    fill(tmp_path / "new", COLOURS, 6)
    record = top1(colours, tmp_path / "new", classes=["red", "blue"])
    assert (record.test_images, record.test_top1_percent) == (12, 100.0)


def test_unknown_classes_are_named_or_left_out(colours, tmp_path, capsys):
    fill(tmp_path / "new", ["red", "green"], 6)
    (tmp_path / "new" / "red").rename(tmp_path / "new" / "cat")
    fill(tmp_path / "more", ["red"], 6)
    (tmp_path / "more" / "red").rename(tmp_path / "new" / "red")
    command = ["evaluate", str(colours / "run"), "--data-dir", str(tmp_path / "new")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "does not know 1 of 3 classes: cat; it knows blue, green, red." in said
    assert said.count("\n") == 1
    assert main([*command, "--skip-unknown-classes"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["test_images"] == 12
    assert json.loads(out)["test_top1_percent"] == 100.0
    assert "left out: 6 images of 1 class that the model does not know (cat)" in err
    shutil.rmtree(tmp_path / "new" / "red")
    shutil.rmtree(tmp_path / "new" / "green")
    assert main([*command, "--skip-unknown-classes"]) == 1


def test_a_run_is_evaluated_on_its_own_data(colours, capsys):
    run = str(colours / "run")
    before = json.loads((colours / "run" / "results.json").read_text())
    assert main(["evaluate", run, "--split", "val"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["val_loss"] == before["val_loss"]
    assert f"top-1 {before['val_top1_percent']:.2f} % (95 %:" in err
    # All of its images were trained on or chose the epoch: they are no test.
    assert main(["evaluate", run]) == 1
    assert "no test part, and the model was trained on it" in capsys.readouterr().err
    assert main(["evaluate", "--model", run, "--data-dir", str(colours / "old")]) == 1
    assert main(["evaluate", run, "--model", run]) == 2


def test_a_run_repeats_what_it_said_of_pictures_that_stand_in_two_parts(run_copy, capsys):
    record = json.loads((run_copy / "results.json").read_text())
    twice = "the same picture twice, which flatters the figures: 1 in train and test"
    record["data_notes"] = ["left out: 2 images", twice]
    (run_copy / "results.json").write_text(json.dumps(record))
    assert main(["evaluate", str(run_copy)]) == 0
    out, err = capsys.readouterr()
    assert f"when it was trained, {twice}\n" in err
    assert json.loads(out)["data_notes"] == [f"when it was trained, {twice}"]
    assert main(["evaluate", str(run_copy), "--data", "mnist"]) == 1  # other pictures
    assert twice not in capsys.readouterr().err
    (run_copy / "results.json").write_text("{")
    assert main(["evaluate", str(run_copy)]) == 1
    assert "results.json is damaged" in capsys.readouterr().err


def test_a_terminal_gets_a_line_and_programs_json(colours, tmp_path, capsys, monkeypatch):
    fill(tmp_path / "new", ["red", "green"], 6)
    command = ["evaluate", str(colours / "run"), "--data-dir", str(tmp_path / "new")]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "evaluate"
    assert "top-1" not in err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "top-1 100.00 %" in err


def test_weights_without_names_need_as_many_classes(colours, tmp_path):
    folder = tmp_path / "nameless"
    folder.mkdir()
    config = json.loads((colours / "run" / "best" / "config.json").read_text())
    del config["label_names"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(colours / "run" / "best" / "model.safetensors", folder)
    fill(tmp_path / "new", ["green", "red"], 6)
    recipe = Recipe(model=f"local-dir:{folder}", data="folder", data_dir=str(tmp_path / "new"))
    with pytest.raises(UserError, match="2 classes and the model 3 that nobody names"):
        evaluate(recipe)
    fill(tmp_path / "blue", ["blue"], 6)
    (tmp_path / "blue" / "blue").rename(tmp_path / "new" / "blue")
    assert evaluate(recipe).test_top1_percent == 100.0


def test_a_bare_file_says_that_position_decides(colours, tmp_path):
    lines = []
    (tmp_path / "alone").mkdir()
    file = shutil.copy(colours / "run" / "best" / "model.safetensors", tmp_path / "alone")
    recipe = Recipe(
        model="vit_tiny_patch16_224",
        model_kwargs={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
        data="folder",
        data_dir=str(colours / "old"),
        img_size=8,
    )
    assert evaluate(recipe, checkpoint=Path(file), say=lines.append).test_top1_percent == 100.0
    (line,) = lines
    assert "matched by position" in line
    assert "(blue, green, red)" in line
    evaluate(recipe, checkpoint=colours / "run/best/model.safetensors", say=lines.append)
    assert f"--model local-dir:{colours / 'run' / 'best'} goes by names" in lines[-1]


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["b", "a"], ["a", "b", "c"], [1, 0]),
        (["a", "x"], ["a"], [0, -1]),
        (["Hot Dog", "ice-cream"], ["hot_dog", "ice cream"], [0, 1]),
        (["0 - zero", "9 - nine"], list("0123456789"), [0, 9]),
        (list("01"), ["0 - zero", "1 - one"], [0, 1]),
        (["T - shirt / top"], ["T-shirt/top"], [0]),
        (["C"], ["C++", "C#"], [-1]),
        (["a b"], ["ab", "a-b"], [-1]),  # it could be either
        (["a b", "a_b"], ["ab"], [-1, -1]),
        (["AB", "ab"], ["ab", "x"], [-1, 0]),  # taken by the one that stands as it is
        (["É"], ["é"], [0]),
    ],
)
def test_names_are_matched_as_they_stand_then_loosely(names, known, expected):
    assert match_names(names, known).tolist() == expected


def test_classes_that_look_alike_are_mentioned():
    assert alike_names(["cat", "dog", "C++", "C#"]) == []
    (line,) = alike_names(["cat", "Cat", "dog", "hot dog", "hot_dog"])
    assert line.endswith("look alike: 'cat' and 'Cat', 'hot dog' and 'hot_dog'")


def test_parts_with_other_numbers_are_brought_together(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(4)]
    train, test = (
        datasets.Dataset.from_dict({"image": pictures, "label": labels}).cast_column(
            "image", datasets.Image()
        )
        for labels in (["dog", "cat", "emu", "cat"], ["emu", "emu", "dog", "dog"])
    )
    (tmp_path / "d").mkdir()
    train.to_parquet(tmp_path / "d" / "train-0.parquet")
    test.to_parquet(tmp_path / "d" / "test-0.parquet")
    source = open_source(Recipe(data=f"hfds/{tmp_path / 'd'}"))
    assert source.class_names == ("cat", "dog", "emu")
    assert source.train.labels.tolist() == [1, 0, 2, 0]
    assert torch.equal(source.test.labels, torch.tensor([2, 2, 1, 1]))
