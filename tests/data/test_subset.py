"""Some classes, and some training images."""

import dataclasses

import pytest
import torch
from PIL import Image

from timm_xformers.data.data import open_data
from timm_xformers.data.sources import Source
from timm_xformers.data.split import PilImages, split_of
from timm_xformers.data.subset import limit_images, select_classes
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe


def labelled(labels, names=()):
    images = [Image.new("L", (4, 4), number) for number in range(len(labels))]
    return split_of(PilImages(images, labels, list(names)), "L")


def pixels(split):
    return [split.image(position).getpixel((0, 0)) for position in range(len(split))]


def animals(test=(0, 1, 2, 3)):
    train = labelled([0, 1, 2, 3] * 5)
    return Source(train, None, labelled(list(test)), ("cat", "dog", "1", "emu"))


def test_classes_are_kept_in_the_given_order():
    source = select_classes(animals(), ["emu", "cat"])
    assert source.class_names == ("emu", "cat")
    assert source.train.labels.tolist() == [1, 0] * 5
    assert pixels(source.train) == [0, 3, 4, 7, 8, 11, 12, 15, 16, 19]
    assert pixels(source.test) == [0, 3]
    assert source.test.labels.tolist() == [1, 0]
    assert source.val is None


def test_labels_serve_where_no_class_has_the_name():
    assert select_classes(animals(), [3, " dog "]).class_names == ("emu", "dog")
    assert select_classes(animals(), ["0", "1"]).class_names == ("cat", "1")
    nameless = dataclasses.replace(animals(), class_names=())
    chosen = select_classes(nameless, [2, 1])
    assert chosen.class_names == ()
    assert pixels(chosen.test) == [1, 2]
    assert chosen.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["cat", "dig"], r"no class 'dig' \(nearest: dog\); use names \(cat, dog, 1, emu\) or"),
        (["cat", 4], "no class '4'; use names .* or labels from 0 to 3"),
        (["cat", True], "no class 'True'"),
        (["cat", "dog", 0], "'0' twice"),
        (["cat"], "two classes or more"),
        ([], "two classes or more"),
    ],
)
def test_unknown_classes_are_refused(wanted, words):
    with pytest.raises(UsageError, match=words):
        select_classes(animals(), wanted)


def test_classes_without_images_are_refused():
    with pytest.raises(UserError, match="no test images of these classes"):
        select_classes(animals(test=[3]), ["cat", "dog"])
    bare = dataclasses.replace(animals(), class_names=("cat", "dog", "1", "emu", "fox"))
    with pytest.raises(UserError, match="no training images of class fox"):
        select_classes(bare, ["cat", "fox"])


def test_a_run_on_some_digits():
    data = open_data(Recipe(classes=[7, "3"]))
    everything = open_data(Recipe())
    assert data.num_classes == 2
    assert data.class_names == ("7", "3")
    chosen = everything.test.labels == 7
    assert torch.equal(data.test.rows[data.test.labels == 0], everything.test.rows[chosen])
    assert len(data.train) + len(data.val) < 300


def test_limit_is_stratified_and_the_same_for_every_seed():
    full = open_data(Recipe(seed=0))
    parts = [open_data(Recipe(seed=seed, limit=100)) for seed in (0, 1)]
    assert len(parts[0].train) == 100
    assert parts[0].train.labels.bincount().min() >= 9
    assert torch.equal(parts[0].train.rows, parts[1].train.rows)
    assert set(parts[0].train.rows.tolist()) < set(full.train.rows.tolist())
    assert torch.equal(parts[0].val.rows, full.val.rows)
    assert torch.equal(parts[0].test.rows, full.test.rows)
    assert len(open_data(Recipe(limit=5000)).train) == len(full.train)


def test_limit_must_leave_every_class():
    split = labelled([0] * 20 + [1] * 2)
    assert limit_images(split, 22) is split
    assert limit_images(split, 10).labels.bincount().tolist() == [9, 1]
    with pytest.raises(UsageError, match="limit=3 leaves images of 1 of 2 classes"):
        limit_images(split, 3)
