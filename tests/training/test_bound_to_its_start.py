"""A run goes on with the data, recipe and folder that it began with, or says what changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from timm_xformers.cli import main
from timm_xformers.data.digest import changes, describe
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_folder
from timm_xformers.training import train as train_module
from timm_xformers.training.session import open_session
from timm_xformers.training.signals import Stopped
from timm_xformers.training.train import resume, train


@pytest.fixture
def cut(tiny, image_folder, monkeypatch):
    """A run on the squares, stopped after its first epoch."""
    original = train_module._Run.save

    def save_and_stop(run, reached=None):
        original(run, reached)
        if run.session.trainer.updates:
            raise Stopped("here", 15)

    monkeypatch.setattr(train_module._Run, "save", save_and_stop)
    recipe = tiny(
        data="folder", data_dir=str(image_folder), img_size=8, batch_size=8, output="run",
        val_fraction=0.25,
    )  # fmt: skip
    with pytest.raises(Stopped):
        train(recipe)
    monkeypatch.setattr(train_module._Run, "save", original)
    return Path("run")


def test_unchanged_or_moved_data_goes_on(cut, image_folder):
    moved = image_folder.with_name("moved")
    image_folder.rename(moved)
    _, record = resume(cut, data_dir=str(moved))
    assert record.epochs == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "train/red/3.png").unlink(), "images instead of"),
        (lambda root: shutil.copy(root / "train/red/3.png", root / "train/red/new.png"),
         "images instead of"),
        (lambda root: (root / "test/red/3.png").unlink(), "7 test images instead of 8"),
        (lambda root: (root / "train/red/3.png").rename(root / "train/red/zz.png"),
         "other names or labels among"),
        (lambda root: (root / "train/red/3.png").rename(root / "train/blue/99.png"),
         "other names or labels among"),
        (lambda root: [(root / split / "red").rename(root / split / "crimson")
                       for split in ("train", "test")], "classes without red and with crimson"),
    ],
)  # fmt: skip
def test_other_data_is_refused_with_the_difference(cut, image_folder, change, words, capsys):
    change(image_folder)
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    assert main(["train", "--resume", "run"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Restore it" in said
    assert {p: p.stat().st_mtime_ns for p in cut.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seed", 3), ("val_fraction", 0.4)])
def test_edited_recipe_is_refused_by_name(cut, key, value):
    values = yaml.safe_load((cut / "recipe.yaml").read_text())
    values[key] = value
    (cut / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{key} is {value} and was"):
        resume(cut)


def test_edits_that_do_not_shape_the_result_are_taken(cut):
    values = yaml.safe_load((cut / "recipe.yaml").read_text()) | {"checkpoint_minutes": 1.0}
    (cut / "recipe.yaml").write_text(yaml.safe_dump(values))
    resume(cut)


def test_checkpoints_of_earlier_versions_go_on(cut):
    for folder in (cut / "last", cut / "last.previous"):
        (folder / "origin.json").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["origin.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    _, record = resume(cut)
    assert record.epochs == 2


def test_a_held_folder_is_refused_and_left_alone(cut, capsys):
    with FileLock(cut / ".lock"):
        assert main(["train", "--resume", "run"]) == 1
    assert "Another process is training in run" in capsys.readouterr().err
    assert resume(cut)[1].epochs == 2
    assert not (cut / ".lock").exists()


def test_the_record_names_the_data_and_tells_others_apart(tiny, image_folder):
    recipe = tiny(data="folder", data_dir=str(image_folder), img_size=8, batch_size=8)
    one = describe(open_session(recipe).data)
    (image_folder / "train/red/3.png").rename(image_folder / "train/red/zz.png")
    two = describe(open_session(recipe).data)
    assert one["splits"]["test"] == two["splits"]["test"]
    assert changes(one, one) == ""
    assert "names or labels" in changes(one, two)


def test_a_removed_folder_is_a_failure(tiny, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="was removed"), write_folder(tmp_path / "a" / "last"):
        pass
    original = train_module._Run._epoch

    def epoch(run, number, *rest):
        if number == 2:
            shutil.rmtree(run.folder.root)
        return original(run, number, *rest)

    monkeypatch.setattr(train_module._Run, "_epoch", epoch)
    tiny(output="run").save(tmp_path / "r.yaml")
    assert main(["train", "--recipe", "r.yaml"]) == 1
    said = capsys.readouterr()
    assert "was removed" in said.err
    assert "Results are in" not in said.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_of_two_resumes_at_once_one_goes_on(cut):
    command = [sys.executable, "-m", "timm_xformers", "train", "--resume", str(cut)]
    runs = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    said = [run.communicate()[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    # The later one finds the folder held or, if it was slow, finished.
    assert codes == [0, 1], said
    assert any("Another process" in text or "is finished" in text for text in said)
