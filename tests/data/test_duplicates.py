"""Pictures that stand in two parts under other names are counted and named."""

import itertools
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from timm_xformers.data.data import open_data
from timm_xformers.data.duplicates import shared_pictures
from timm_xformers.data.hub import HubImages
from timm_xformers.data.split import split_of
from timm_xformers.recipe import Recipe


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"train": 10, "val": 2, "test": 3}
    for part, name in itertools.product(sizes, ("cat", "dog")):
        (tmp_path / "d" / part / name).mkdir(parents=True)
        for number in range(sizes[part]):
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            # Without compression, so that all files have one size and are read.
            image.save(tmp_path / "d" / part / name / f"{part}{number}.bmp")
    return tmp_path / "d"


def notes(root, used=("train", "val", "test"), **values):
    recipe = Recipe(data="folder", data_dir=str(root), img_size=8, **values)
    return [note for note in open_data(recipe, used).notes if "same picture" in note]


def test_different_pictures_are_not_mentioned(root):
    assert notes(root) == []


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_counted_and_named_in_one_line(root, packed):
    for number in (1, 4):
        shutil.copy(root / f"train/cat/train{number}.bmp", root / f"test/dog/copy{number}.bmp")
    shutil.copy(root / "val/dog/val1.bmp", root / "test/dog/again.bmp")
    if packed:
        subprocess.run(["tar", "cf", f"{root}.tar", "-C", root, "train", "val", "test"], check=True)
        shutil.rmtree(root)
        root = root.with_name("d.tar")
    (note,) = notes(root, val_split="val")
    assert "2 in train and test (such as" in note
    assert "1 in val and test (such as" in note
    assert "cat/train1.bmp and " in note
    assert "dog/copy1.bmp" in note
    assert note.kept == (
        "the same picture twice, which flatters the figures: 2 in train and test, 1 in val and test"
    )
    assert notes(root, ["test"], val_split="val") == []


def test_copies_within_training_that_validation_draws(root):
    for path in list((root / "train").rglob("*.bmp")):
        shutil.copy(path, path.with_stem(f"{path.stem}b"))
    shutil.rmtree(root / "val")
    (note,) = notes(root, val_fraction=0.25)
    assert "in train and val (such as" in note


def test_rows_without_a_picture_are_left_to_those_who_name_them():
    rows = [{"image": None}, {"image": Image.new("L", (2, 2))}, {"image": {"path": "gone.png"}}]
    split = split_of(HubImages(rows, "image", [0, 1, 1]), "L")
    assert shared_pictures({"train": split, "test": split}) == []
