"""Sources, splits and batches."""

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from timm_xformers.data import loader
from timm_xformers.data.data import make_batches, open_data
from timm_xformers.data.loader import usable_cores
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.data.sampling import eval_batches
from timm_xformers.data.split import PilImages
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe

CPU = torch.device("cpu")
SQUARES = Preprocessing(img_size=16, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def rows(split):
    return set(split.rows.tolist())


def whole(split, recipe, preprocessing, *, training=False, epoch=0, order=None):
    batches = make_batches(
        split,
        recipe,
        preprocessing,
        in_memory=bool(recipe.in_memory),
        training=training,
        device=CPU,
    )
    order = eval_batches(len(split), 8) if order is None else order
    images, labels = zip(*batches.batches(order, epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_test_split_never_moves():
    data = open_data(Recipe(seed=5, val_fraction=0.2))
    digest = hashlib.sha256(bytes(str(sorted(rows(data.test))), "ascii")).hexdigest()
    assert len(data.test) == 599
    assert digest[:16] == "749519955196c974"


def test_digits_splits_are_stratified_disjoint_and_complete():
    data = open_data(Recipe())
    splits = (data.train, data.val, data.test)
    assert [len(split) for split in splits] == [1078, 120, 599]
    assert set().union(*map(rows, splits)) == set(range(1797))
    for split in splits:
        shares = split.labels.bincount() / len(split)
        assert shares.min() > 0.09
        assert shares.max() < 0.11
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, 8)
    assert data.class_names == tuple("0123456789")


def test_validation_part_follows_its_fraction_not_the_seed():
    def part(**values):
        return rows(open_data(Recipe(**values)).val)

    assert part(seed=0) == part(seed=1)
    assert len(part(val_fraction=0.25)) == 300
    assert open_data(Recipe(val_fraction=0.0)).val is None


def test_digits_in_memory_are_the_originals_normalised():
    from sklearn.datasets import load_digits

    data = open_data(Recipe(in_memory=True))
    facts = Preprocessing(8, 1, data.mean, data.std)
    images, labels = whole(data.train, Recipe(in_memory=True), facts)

    original = load_digits().images[data.train.rows.numpy()]
    expected = (original / 16 - data.mean[0]) / data.std[0]
    np.testing.assert_allclose(images[:, 0].numpy(), expected, atol=0.006)  # 1 of 255 steps
    assert torch.equal(labels, data.train.labels)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_other_size_and_channels_are_honoured():
    recipe = Recipe(in_memory=True, in_chans=3)
    data = open_data(recipe)
    facts = Preprocessing(12, 3, (0.5,) * 3, (0.5,) * 3)
    images, _ = whole(data.test, recipe, facts)
    assert images.shape == (599, 3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])


def test_too_large_a_split_is_not_held_in_memory():
    data = open_data(Recipe())
    with pytest.raises(UserError, match="in_memory=false"):
        whole(data.train, Recipe(in_memory=True), Preprocessing(4096, 1, (0.5,), (0.5,)))


@pytest.mark.parametrize("in_memory", [False, True])
def test_folder_of_images(image_folder, in_memory):
    recipe = Recipe(
        data="folder",
        data_dir=str(image_folder),
        in_memory=in_memory,
        val_fraction=0.25,
        num_workers=0,
    )
    data = open_data(recipe)
    assert [len(data.train), len(data.val), len(data.test)] == [18, 6, 8]
    assert data.class_names == ("blue", "red")
    assert data.val.labels.bincount().tolist() == [3, 3]

    images, labels = whole(data.test, recipe, SQUARES)

    red_minus_blue = (images[:, 0] - images[:, 2]).mean(dim=(1, 2))
    assert torch.equal(red_minus_blue > 0, labels == 1)


def test_memory_and_files_evaluate_on_the_same_pixels(image_folder):
    recipe = Recipe(data="folder", data_dir=str(image_folder), num_workers=0, in_memory=False)
    data = open_data(recipe)
    from_files, _ = whole(data.test, recipe, SQUARES)
    held, _ = whole(data.test, dataclasses.replace(recipe, in_memory=True), SQUARES)
    torch.testing.assert_close(from_files, held, atol=1e-5, rtol=0)


def test_workers_and_entry_point_do_not_change_a_sample(image_folder):
    recipe = Recipe(
        data="folder",
        data_dir=str(image_folder),
        in_memory=False,
        hflip=0.5,
        re_prob=0.5,
        num_workers=0,
        auto_augment="rand-m9-mstd0.5",
    )
    data = open_data(recipe)
    order = eval_batches(len(data.train), 8)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone, _ = whole(data.train, recipe, SQUARES, training=True, epoch=1)
    late, _ = whole(data.train, recipe, SQUARES, training=True, epoch=1, order=order[1:])
    workers = dataclasses.replace(recipe, num_workers=1)
    shared, _ = whole(data.train, workers, SQUARES, training=True, epoch=1)
    other, _ = whole(data.train, recipe, SQUARES, training=True, epoch=2)

    assert torch.equal(alone, shared)
    assert torch.equal(alone[8:], late)
    assert not torch.equal(alone, other)
    assert before.shape == torch.get_rng_state().shape


def test_no_more_decoders_than_cores(image_folder, monkeypatch):
    started = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, **kwargs):
            started.append(num_workers)
            super().__init__(*args, num_workers=0, **{**kwargs, "persistent_workers": False})

    monkeypatch.setattr(loader, "DataLoader", Loader)
    recipe = Recipe(data="folder", data_dir=str(image_folder), in_memory=False, num_workers=64)
    whole(open_data(recipe).train, recipe, SQUARES)
    assert started == [usable_cores()]


def test_own_validation_folder_is_used_beside_a_test_folder(image_folder):
    (image_folder / "test").rename(image_folder / "val")
    alone = open_data(Recipe(data="folder", data_dir=str(image_folder)))
    assert (len(alone.test), len(alone.val)) == (8, 2)

    for name in ("blue", "red"):
        (image_folder / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image_folder / "test" / name / "0.png")
    both = open_data(Recipe(data="folder", data_dir=str(image_folder)))
    assert [len(both.train), len(both.val), len(both.test)] == [24, 8, 2]

    named = Recipe(
        data="folder",
        data_dir=str(image_folder),
        train_split="val",
        val_split="test",
        test_split="train",
    )
    data = open_data(named)
    assert [len(data.train), len(data.val), len(data.test)] == [8, 2, 24]


def test_flat_folder_and_tar_are_all_training(image_folder, tmp_path):
    import tarfile

    flat = open_data(Recipe(data="folder", data_dir=str(image_folder / "train")))
    with tarfile.open(tmp_path / "squares.tar", "w") as archive:
        archive.add(image_folder / "train", arcname="squares")
    packed = open_data(Recipe(data="folder", data_dir=str(tmp_path / "squares.tar")))
    for data in (flat, packed):
        assert data.test is None
        assert len(data.train) + len(data.val) == 24
        with pytest.raises(UserError, match="no test split; it has train, val"):
            data.split("test")


def test_class_missing_from_the_test_folder_keeps_the_numbers(image_folder):
    for path in (image_folder / "test" / "blue").iterdir():
        path.unlink()
    data = open_data(Recipe(data="folder", data_dir=str(image_folder)))
    assert data.test.labels.tolist() == [1, 1, 1, 1]


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def fake_mnist():
    rng = np.random.default_rng(0)
    return {
        split: (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        for split, count in (("train", 40), ("t10k", 20))
    }


def test_mnist_in_torchvision_layout(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = fake_mnist()
    for split, (images, labels) in arrays.items():
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)

    data = open_data(Recipe(data="mnist", data_dir=str(tmp_path)))

    assert [len(data.train), len(data.val), len(data.test)] == [36, 4, 20]
    assert data.in_memory
    facts = Preprocessing(28, 1, (0.0,), (1 / 255,))
    images, labels = whole(data.test, Recipe(in_memory=True), facts)
    np.testing.assert_allclose(images[:, 0].numpy(), arrays["t10k"][0], atol=1e-3)
    assert labels.tolist() == arrays["t10k"][1].tolist()


def test_mnist_in_parquet_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))}
    )
    arrays = fake_mnist()
    folder = tmp_path / "store" / "mnist"
    folder.mkdir(parents=True)
    for split, (images, labels) in zip(("train", "test"), arrays.values(), strict=True):
        columns = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{split}-0.parquet")

    for root in (folder, folder.parent):
        data = open_data(Recipe(data="mnist", data_dir=str(root)))
        assert data.in_memory
        assert [len(data.train), len(data.val), len(data.test)] == [36, 4, 20]
    assert data.class_names == tuple("0123456789")
    facts = Preprocessing(28, 1, (0.0,), (1 / 255,))
    images, labels = whole(data.test, Recipe(in_memory=True), facts)
    np.testing.assert_allclose(images[:, 0].numpy(), arrays["t10k"][0], atol=1e-3)
    assert labels.tolist() == arrays["t10k"][1].tolist()


def test_download_is_asked_of_torchvision(tmp_path, monkeypatch):
    asked = []

    def fake(name, **kwargs):
        asked.append((name, kwargs["split"], kwargs["download"]))
        raise RuntimeError("no network here")

    monkeypatch.setattr("timm_xformers.data.sources.create_dataset", fake)
    with pytest.raises(UserError, match="no network here"):
        open_data(Recipe(data="cifar10", data_dir=str(tmp_path / "new"), download=True))
    assert asked[0] == ("torch/cifar10", "train", True)


def test_streams_are_read_into_memory(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ((Image.new("RGB", (8, 8), (i, 0, 0)), i % 2) for i in range(20))

    def fake(name, split, **kwargs):
        if split != "train":
            raise ValueError(f"Unknown split {split}")
        return Stream()

    monkeypatch.setattr("timm_xformers.data.sources.create_dataset", fake)
    data = open_data(Recipe(data="tfds/some", data_dir=".", val_fraction=0.1))
    assert [len(data.train), len(data.val)] == [18, 2]
    assert data.train.image(0).getpixel((0, 0))[0] == int(data.train.rows[0])


@pytest.mark.parametrize("labels", [["cat", "dog"], [0.5, 1.5]])
def test_labels_that_are_no_numbers_are_shown(labels):
    with pytest.raises(UserError, match=f"the first here is {labels[0]!r}"):
        PilImages([Image.new("L", (8, 8))] * 2, labels, [])


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"data": "digit"}, UsageError, "nearest: digits"),
        ({"data": "mnist"}, UserError, "needs a folder"),
        ({"data": "mnist", "data_dir": "."}, UserError, r"neither MNIST/raw nor \*.parquet"),
        ({"data": "folder"}, UserError, "needs --data-dir"),
        ({"data": "folder", "data_dir": "nowhere"}, UserError, "nowhere does not exist"),
        ({"data": "folder", "data_dir": "."}, UserError, "Found 0 images"),
        ({"data": "torch/mnist", "data_dir": "nowhere"}, UserError, "does not exist"),
        ({"data": "torch/mist", "data_dir": "."}, UserError, "Unknown torchvision dataset mist"),
        ({"data": "wds/x", "data_dir": "."}, UserError, "No training shards"),
        ({"test_split": "train"}, UsageError, "splits of digits are fixed"),
        ({"num_classes": 5}, UserError, "Label 9 is out of range: 5 classes"),
        ({"in_chans": 2}, UsageError, "1 .grey. or 3 .RGB."),
        ({"val_fraction": 0.0001}, UserError, "is none"),
        ({"auto_augment": "rand-m9"}, UsageError, "auto_augment works only from files"),
        ({"rand_augment": "n2"}, UsageError, "rand_augment='n2' is unknown"),
        ({"data": "tiny_imagenet"}, UserError, "pass --data-dir with parquet files[.]"),
        ({"data": "tiny_imagenet", "data_dir": "."}, UserError, r"no \*.parquet is there"),
        ({"data": "tiny_imagenet", "download": True}, UsageError, "drop download"),
    ],
)
def test_mistakes_are_named(values, kind, words):
    with pytest.raises(kind, match=words):
        open_data(Recipe(**values))


def test_empty_class_folders_are_named(image_folder):
    recipe = Recipe(data="folder", data_dir=str(image_folder))
    (image_folder / "train" / ".cache").mkdir()
    (image_folder / "test" / "green").mkdir()
    open_data(recipe)
    (image_folder / "train" / "green").mkdir()
    (image_folder / "train" / "green" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"class folders without images .*[.]png.*: green; add"):
        open_data(recipe)


def test_small_sets_are_held_in_memory_unless_told_otherwise(image_folder):
    folder = Recipe(data="folder", data_dir=str(image_folder), val_fraction=0.0)

    def held(used=("train", "test"), **values):
        return open_data(dataclasses.replace(folder, **values), used).in_memory

    # 24 training and 8 test images with 3 channels; one GiB is 32 of 3,344 pixels.
    assert held(img_size=3344)
    assert not held(img_size=3345)
    assert held(["test"], img_size=3345)
    assert held(img_size=3345, in_chans=1)
    assert held(img_size=3345, limit=20)
    assert held(img_size=3345, in_memory=True)
    assert not held(img_size=16, in_memory=False)
    # Without img_size the model's own size counts, where its name tells it.
    assert held(model="vit_tiny_patch16_224")
    assert not held(model="local-dir:somewhere")
    assert not open_data(Recipe(img_size=2000)).in_memory


def test_mistakes_in_folders_are_named(image_folder):
    recipe = Recipe(data="folder", data_dir=str(image_folder))
    with pytest.raises(UsageError, match="crop_pad works only in memory"):
        open_data(dataclasses.replace(recipe, crop_pad=2, in_memory=False))
    with pytest.raises(UserError, match="no 'dev' in"):
        open_data(dataclasses.replace(recipe, val_split="dev"))
    with pytest.raises(UserError, match="form one class"):
        open_data(dataclasses.replace(recipe, data_dir=str(image_folder / "train" / "red")))
    (image_folder / "test" / "green").mkdir()
    Image.new("RGB", (8, 8)).save(image_folder / "test" / "green" / "0.png")
    with pytest.raises(UserError, match="classes that the training images lack: green"):
        open_data(recipe)
