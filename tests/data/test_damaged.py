"""Unreadable images: named before training, or left out and counted; never replaced."""

import dataclasses
import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from timm_xformers.data import damaged, memory
from timm_xformers.data.data import make_batches, open_data
from timm_xformers.data.memory import decode
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.data.sampling import eval_batches
from timm_xformers.data.sources import open_source
from timm_xformers.errors import UserError
from timm_xformers.predicting.evaluate import evaluate
from timm_xformers.recipe import Recipe
from timm_xformers.training.train import train

pytestmark = pytest.mark.usefixtures("quick_pictures")

SQUARES = Preprocessing(img_size=16, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def batches(split, recipe, in_memory):
    return make_batches(
        split,
        recipe,
        SQUARES,
        in_memory=in_memory,
        training=False,
        device=torch.device("cpu"),
    )


def read_all(split, recipe, in_memory):
    order = eval_batches(len(split), 8)
    return torch.cat([labels for _, labels in batches(split, recipe, in_memory).batches(order)])


def encoded(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def harm_inside(path):
    """Damage that neither head nor tail shows."""
    content = bytearray(encoded("PNG"))
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)


@pytest.fixture
def broken(image_folder):
    """Three broken images: empty in training, text in training, cut off in the test."""
    (image_folder / "train" / "red" / "3.png").write_bytes(b"")
    (image_folder / "train" / "blue" / "5.png").write_bytes(b"<html>not found</html>")
    path = image_folder / "test" / "red" / "2.png"
    path.write_bytes(encoded("PNG")[:-600])
    return image_folder


@pytest.mark.parametrize("in_memory", [False, True])
def test_error_names_them_before_training(broken, in_memory, tiny, tmp_path):
    recipe = tiny(data="folder", data_dir=str(broken), val_fraction=0.0, in_memory=in_memory)
    recipe = dataclasses.replace(recipe, img_size=16, batch_size=4, num_workers=0)
    names = r"\S*train/blue/5\.png, \S*train/red/3\.png, \S*test/red/2\.png"
    words = rf"^Cannot read 3 of 32 images: {names} \(the first: not an image[^\n]*skip\.$"
    with pytest.raises(UserError, match=words):
        train(recipe)
    assert not (tmp_path / "runs").exists()


def test_in_memory_damage_inside_a_test_image_stops_the_run_before_training(
    image_folder, tiny, tmp_path
):
    harm_inside(image_folder / "test" / "red" / "3.png")
    recipe = tiny(data="folder", data_dir=str(image_folder), img_size=16, batch_size=4)
    with pytest.raises(UserError, match=r"Cannot read 1 of 8 images: \S*test/red/3\.png"):
        train(recipe)
    assert not list(tmp_path.rglob("results.csv"))


def test_processes_that_share_the_decoding_change_nothing(image_folder, monkeypatch):
    recipe = Recipe(data="folder", data_dir=str(image_folder), val_fraction=0.0)
    split = open_data(recipe).train
    alone = decode(split, SQUARES, num_workers=0)
    monkeypatch.setattr(memory, "SHARED_FROM", 1)
    before = torch.get_rng_state()
    assert torch.equal(decode(split, SQUARES, num_workers=2), alone)
    assert torch.equal(torch.get_rng_state(), before)
    harm_inside(image_folder / "train" / "red" / "0.png")
    with pytest.raises(UserError, match=r"Cannot read 1 of 24 images: \S*red/0\.png"):
        decode(split, SQUARES, num_workers=2)


def test_at_most_ten_are_named(broken):
    for path in (broken / "train").rglob("*.png"):
        path.write_bytes(b"")
    recipe = Recipe(data="folder", data_dir=str(broken), in_memory=False, val_fraction=0.0)
    with pytest.raises(UserError, match=r"Cannot read 25 of 32 images: .* and 15 more") as caught:
        open_data(recipe)
    assert str(caught.value).count(".png") == 10
    with pytest.raises(UserError, match="Not one of 24 images can be read"):
        open_data(dataclasses.replace(recipe, unreadable="skip"))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_skip_leaves_them_out(broken, in_memory, num_workers):
    harm_inside(broken / "train" / "red" / "7.png")
    recipe = Recipe(
        data="folder",
        data_dir=str(broken),
        in_memory=in_memory,
        num_workers=num_workers,
        unreadable="skip",
        val_fraction=0.25,
    )
    data = open_data(recipe)
    assert len(data.train) + len(data.val) == 21
    assert [name[-9:] for name in data.skipped if "/test/" in name] == ["red/2.png"]
    assert len(data.skipped) == 4
    assert read_all(data.test, recipe, in_memory).tolist() == [0, 0, 0, 0, 1, 1, 1]

    # The others are where they would be if nothing were broken.
    for name in ("train/red/3.png", "train/blue/5.png", "train/red/7.png"):
        Image.new("RGB", (20, 20)).save(broken / name)
    whole = open_data(recipe)
    assert set(data.val.rows.tolist()) <= set(whole.val.rows.tolist())


def test_a_run_logs_and_counts_what_it_left_out(broken, tiny):
    for part in ("train", "test"):
        Image.new("RGB", (4, 4)).save(broken / part / "secret.png")
    recipe = tiny(
        data="folder", data_dir=str(broken), unreadable="skip", img_size=16, batch_size=4, epochs=1
    )
    folder, record = train(recipe)
    assert record.skipped_images == 3
    assert json.loads(folder.record.read_text())["skipped_images"] == 3
    log = folder.log.read_text()
    assert log.count("left out, cannot be read: ") == 3
    assert "red/2.png" in log
    weights = f"local-dir:{folder.best}"
    again = evaluate(dataclasses.replace(recipe, model=weights, model_kwargs={}), "test")
    assert (again.test_images, again.skipped_images) == (7, 1)
    # What else is left out is in the records too, without names of files.
    for made in (record, again):
        assert "left out: 2 images beside the class folders" in made.data_notes
        assert "secret" not in json.dumps(made.data_notes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_inside_a_file_stops_the_run_when_it_is_met(image_folder, num_workers):
    harm_inside(image_folder / "test" / "red" / "3.png")
    recipe = Recipe(
        data="folder", data_dir=str(image_folder), num_workers=num_workers, in_memory=False
    )
    data = open_data(recipe)
    with pytest.raises(UserError, match=r"^Cannot read image \S*3\.png: [^\n]*$"):
        read_all(data.test, recipe, in_memory=False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_glance_finds_cut_files_and_no_others(image_folder, kind):
    content = encoded(kind)
    path = image_folder / "test" / "red" / "cut.jpg"  # decoders go by content, listings by name
    recipe = Recipe(data="folder", data_dir=str(image_folder), in_memory=False)
    for whole in (content, content + b"more bytes, as some cameras write"):
        path.write_bytes(whole)
        open_data(recipe)
    for length in (0, 10, len(content) // 2, len(content) - 300):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"Cannot read 1 of 33 images: \S*cut"):
            open_data(recipe)


def test_a_glance_at_a_large_set_is_spread_evenly(image_folder, monkeypatch):
    monkeypatch.setattr(damaged, "CHECKED_FILES", 6)
    seen = []
    monkeypatch.setattr(damaged, "_looks_whole", lambda path: seen.append(path) or True)
    recipe = Recipe(data="folder", data_dir=str(image_folder), in_memory=False, val_fraction=0.0)
    open_data(recipe, ["train"])
    assert [path.stem for path in seen] == ["0", "4", "8"] * 2


def test_the_next_image_is_never_put_in_the_place(broken, caplog):
    # timm's own data set does that, with a line in the log.
    recipe = Recipe(data="folder", data_dir=str(broken), in_memory=True)
    source = open_source(recipe)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        batches(source.test, recipe, in_memory=True)
    assert "Skipped" not in caplog.text
