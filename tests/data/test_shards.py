"""Shards give the images of the folder they were written from, at any position, or say why not."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from timm_xformers.data import shards as shards_module
from timm_xformers.data.data import open_data
from timm_xformers.data.sampling import train_batches
from timm_xformers.data.shard_writer import write_shards
from timm_xformers.data.sources import open_source
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe
from timm_xformers.training.session import open_session


@pytest.fixture
def shards(image_folder, tmp_path):
    """The squares of `image_folder` in shards of five."""
    folder = tmp_path / "shards"
    lengths = write_shards(Recipe(data="folder", data_dir=str(image_folder)), folder, 5)
    assert lengths == {"train": [5, 5, 5, 5, 4], "validation": [5, 3]}
    return folder


def opened(folder, **values):
    return open_source(Recipe(data="wds/squares", data_dir=str(folder), **values))


def contents(split):
    """Label and pixels of every image, in an order of their own."""
    return sorted(
        (int(split.labels[i]), split.image(i).size, split.image(i).tobytes())
        for i in range(len(split))
    )


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards_hold_what_the_folder_holds(image_folder, shards):
    folder = open_source(Recipe(data="folder", data_dir=str(image_folder)))
    source = opened(shards)
    assert source.val is None  # the only held-out part is the test set, as in a folder
    assert contents(source.train) == contents(folder.train)
    assert contents(source.test) == contents(folder.test)
    assert source.class_names == folder.class_names == ("blue", "red")
    # Written in a drawn order: the first shard holds both classes.
    assert len(set(source.train.labels[:5].tolist())) == 2


def test_images_that_have_no_file_are_written_as_png(tmp_path):
    write_shards(Recipe(), tmp_path / "digits", 1000)
    source = opened(tmp_path / "digits", in_chans=1)
    digits = open_source(Recipe())
    assert contents(source.train) == contents(digits.train)
    assert contents(source.test) == contents(digits.test)


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_epoch_over_all_processes_sees_every_image_once(shards, in_memory):
    recipe = Recipe(
        model="vit_tiny_patch16_224",
        model_kwargs={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
        data="wds/squares",
        data_dir=str(shards),
        in_memory=in_memory,
        val_fraction=0,
        img_size=20,
        batch_size=4,
    )
    session = open_session(recipe)
    batches = session.batches(session.data.train)
    assert session.data.in_memory == in_memory
    seen = []
    for rank in range(2):
        order = train_batches(24, 4, seed=1, epoch=3, rank=rank, world_size=2)
        for positions, (images, labels) in zip(order, batches.batches(order, 3), strict=True):
            assert torch.equal(labels, session.data.train.labels[positions])
            assert torch.equal(labels, (images[:, 0, 5, 2] > images[:, 2, 5, 2]).long())  # red
            seen += positions.tolist()
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("split", ["train-{0000..0001}.tar", "train-{0000..0001}.tar|10"])
def test_a_pattern_names_some_shards(shards, split):
    assert len(opened(shards, train_split=split).train) == 10
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards .* train-0005[.]tar"):
        opened(shards, train_split="train-{0003..0005}.tar")
    both = opened(shards, train_split="train-0000.tar::train-0004.tar").train
    assert len(both) == 9


def test_names_of_tars_do_without_a_description(shards):
    (shards / "_info.json").unlink()
    for path in shards.glob("*.tar"):
        path.rename(path.with_name(f"squares-{path.name}"))
    source = opened(shards)
    assert [len(source.train), len(source.test), source.class_names] == [24, 8, ()]
    with pytest.raises(UserError, match="no shards of 'trains'"):
        opened(shards, train_split="trains")


def test_index_is_made_once_and_again_after_a_change(shards, monkeypatch):
    before = contents(opened(shards).train)
    scans = []
    scan = shards_module._scan
    monkeypatch.setattr(shards_module, "_scan", lambda path: scans.append(path) or scan(path))
    assert contents(opened(shards).train) == before
    assert scans == []
    info = json.loads((shards / "_info.json").read_text())
    (shards / "train-0000.tar").write_bytes((shards / "train-0004.tar").read_bytes())
    with pytest.raises(UserError, match=r"train-0000[.]tar holds 4 images, .* says 5"):
        opened(shards)
    info["splits"]["train"]["shard_lengths"][0] = 4
    (shards / "_info.json").write_text(json.dumps(info))
    assert len(opened(shards).train) == 23
    (shards / ".index-train.npz").write_bytes(b"PK\3\4 half")
    assert len(opened(shards).train) == 23
    assert not list(shards.glob(".txf-*"))


def test_shards_in_a_folder_that_cannot_be_written(shards, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "no rights")

    monkeypatch.setattr(np, "savez", refuse)
    assert len(opened(shards).train) == 24
    assert not list(shards.glob(".index-*"))


def test_damage_is_named(shards, image_folder):
    (shards / "_info.json").unlink()
    first = shards / "train-0000.tar"
    whole = first.read_bytes()
    first.write_bytes(whole[:550])
    with pytest.raises(UserError, match=r"Cannot index .*train-0000[.]tar: unexpected end of data"):
        opened(shards)
    first.write_bytes(b"\x1f\x8b" + whole[2:])
    with pytest.raises(UserError, match="uncompressed tar"):
        opened(shards)
    png = (image_folder / "train" / "red" / "1.png").read_bytes()
    write_tar(first, [("a.png", png), ("b.png", png), ("b.cls", b"1")])
    with pytest.raises(UserError, match=r"a in .*train-0000[.]tar has no label"):
        opened(shards)
    write_tar(first, [("a.cls", b"1")])
    with pytest.raises(UserError, match=r"has no image [(][.]jpg"):
        opened(shards)
    write_tar(first, [("a.png", png), ("a.cls", b"one")])
    with pytest.raises(UserError, match="Cannot index"):
        opened(shards)
    write_tar(first, [("x/a.json", b"{}"), ("x/a.png", png[:60]), ("x/a.cls", b"1")])
    split = opened(shards).train
    with pytest.raises(UserError, match=r"Cannot read image .*train-0000[.]tar/x/a[.]png"):
        split.image(0)
    data = open_data(
        Recipe(data="wds/x", data_dir=str(shards), unreadable="skip", in_memory=False, img_size=20)
    )
    assert len(data.skipped) == 1


def test_mistakes_in_descriptions_are_named(shards):
    (shards / "_info.json").write_text("[1]")
    with pytest.raises(UserError, match="is no description of shards"):
        opened(shards)
    with pytest.raises(UserError, match="is no folder"):
        opened(shards / "none")
    with pytest.raises(UserError, match="needs --data-dir"):
        open_source(Recipe(data="wds/x"))


def test_writing_refuses_full_folders_and_damaged_images(image_folder, shards, tmp_path):
    recipe = Recipe(data="folder", data_dir=str(image_folder))
    with pytest.raises(UsageError, match="is not empty"):
        write_shards(recipe, shards, 5)
    with pytest.raises(UsageError, match="images_per_shard=0"):
        write_shards(recipe, tmp_path / "new", 0)
    (image_folder / "train" / "red" / "1.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"Cannot read image .*1[.]png"):
        write_shards(recipe, tmp_path / "new", 5)


@pytest.mark.parametrize(
    "info",
    [
        "[1]",
        "{",
        '{"splits": 3}',
        '{"splits": {"train": 3}}',
        '{"splits": {"train": {"filenames": "train-0000.tar"}}}',
        '{"splits": {"train": {"filenames": [1]}}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": [5, 5]}}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": ["5"]}}}',
        '{"class_names": {"a": 0}}',
        '{"class_names": [1, 2]}',
        "[" * 5000,
    ],
)
def test_odd_descriptions_are_one_sentence(shards, info):
    (shards / "_info.json").write_text(info)
    with pytest.raises(UserError, match=r"_info[.]json is no description of shards: .*; repair or"):
        opened(shards)


def test_labels_out_of_range_never_widen_a_model(shards, image_folder):
    png = (image_folder / "train" / "red" / "1.png").read_bytes()
    (shards / "_info.json").unlink()
    for label, words in ((99, "99 is the highest"), (-1, "Label -1 is out of range")):
        members = [
            (f"{n}.{kind}", value)
            for n in range(8)
            for kind, value in (("png", png), ("cls", str(n % 2 if n < 7 else label).encode()))
        ]
        write_tar(shards / "train-0000.tar", members)
        with pytest.raises(UserError, match=words):
            open_data(
                Recipe(
                    data="wds/x",
                    data_dir=str(shards),
                    train_split="train-0000.tar",
                    val_fraction=0.3,
                    test_split="none",
                )
            )


def test_the_same_tar_is_never_in_two_splits(shards):
    with pytest.raises(UsageError, match="would share images"):
        opened(shards, train_split="train-{0000..0002}.tar", test_split="train-0002.tar")
    with pytest.raises(UsageError, match="would share images"):
        opened(shards, val_split="validation", test_split="validation")


def test_two_images_of_one_name_are_refused(shards, image_folder):
    png = (image_folder / "train" / "red" / "1.png").read_bytes()
    (shards / "_info.json").unlink()
    write_tar(shards / "train-0000.tar", [("a.png", png), ("a.jpg", png), ("a.cls", b"1")])
    with pytest.raises(UserError, match=r"a in .* has two images"):
        opened(shards)
