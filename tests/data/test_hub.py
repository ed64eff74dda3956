"""Columns, splits and faults of data sets in the Hub's form."""

import numpy as np
import pytest
from PIL import Image

from timm_xformers.data.data import open_data
from timm_xformers.data.sources import open_source
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe

datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def write(folder, split, columns, features, count=10):
    columns = {
        name: [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(count)]
        if value is None
        else value
        for name, value in columns.items()
    }
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def opened(folder, prefix="hfds", **values):
    return open_source(Recipe(data=f"{prefix}/{folder}", **values))


CLASS = datasets.ClassLabel(names=NAMES)
LABELS = [n % 2 for n in range(10)]


@pytest.mark.parametrize("prefix", ["hfds", "hfids", "HFDS"])
@pytest.mark.parametrize("image", ["image", "img", "picture", "anything"])
@pytest.mark.parametrize("label", ["label", "fine_label", "kind"])
def test_columns_of_any_usual_name(folder, prefix, image, label):
    write(folder, "train", {image: None, label: LABELS}, {image: datasets.Image(), label: CLASS})
    source = opened(folder, prefix)
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == LABELS
    assert source.train.image(7).getpixel((0, 0)) == (7, 0, 0)


def test_one_of_two_columns_of_classes_is_chosen(folder):
    coarse = datasets.ClassLabel(names=["pet", "beast"])
    columns = {"img": None, "fine_label": LABELS, "coarse_label": [1] * 5 + [0] * 5}
    write(
        folder,
        "train",
        columns,
        {"img": datasets.Image(), "fine_label": CLASS, "coarse_label": coarse},
    )
    assert opened(folder).class_names == ("cat", "dog")
    source = opened(folder, labels="coarse_label")
    assert source.class_names == ("pet", "beast")
    assert source.train.labels.tolist() == columns["coarse_label"]
    with pytest.raises(
        UserError, match=r"no column 'coarse' \(nearest: coarse_label\); its columns"
    ):
        opened(folder, labels="coarse")


def test_without_columns_of_pictures_or_classes_those_there_are_are_named(folder):
    write(
        folder,
        "train",
        {"img": None, "x": LABELS},
        {"img": datasets.Image(), "x": datasets.Value("int64")},
    )
    with pytest.raises(
        UserError, match=r"no column of classes .* img \(Image\), x \(int64\): name one"
    ):
        opened(folder)
    assert opened(folder, labels="x").train.labels.tolist() == LABELS
    write(folder, "train", {"x": LABELS}, {"x": datasets.Value("int64")})
    with pytest.raises(UserError, match=r"no column of pictures; its columns are x \(int64\)"):
        opened(folder)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("float32", [0.5] * 10, "the first here is 0.5"),
        ("int64", [None] + [0] * 9, "the first here is None"),
        ("int64", [0, 1] * 4 + [0, 99], r"99 is the highest, and no image has label 2, 3, 4"),
        ("int64", [0, 1] * 4 + [0, -1], "Label -1 is out of range"),
    ],
)
def test_labels_that_are_no_classes(folder, kind, values, words):
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    write(folder, "train", {"image": None, "label": values}, features)
    with pytest.raises(UserError, match=words):
        open_data(Recipe(data=f"hfds/{folder}", val_fraction=0.2))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (datasets.Sequence(CLASS), [[0], [0, 1]] * 5),
        (datasets.Sequence(datasets.Value("string")), [["cat"], ["cat", "dog"]] * 5),
        (datasets.Value("string"), ["cat", "dog", "dog cat", "cat", "dog"] * 2),
        (datasets.Value("string"), ["cat|dog", "dog|fox"] * 5),
    ],
)
def test_several_classes_a_picture_are_refused_with_the_reason(folder, kind, values):
    features = {"image": datasets.Image(), "labels": kind}
    write(folder, "train", {"image": None, "labels": values}, features)
    with pytest.raises(UserError, match="multi-label"):
        opened(folder)


@pytest.mark.parametrize("label", [2, 99])
def test_a_label_without_a_name_never_widens_a_model(folder, label, monkeypatch):
    write(
        folder,
        "train",
        {"image": None, "label": LABELS},
        {"image": datasets.Image(), "label": CLASS},
    )
    source = opened(folder)
    source.train.labels[3] = label
    monkeypatch.setattr("timm_xformers.data.data.open_source", lambda *_: source)
    with pytest.raises(UserError, match=f"Label {label} is out of range: 2 classes"):
        open_data(Recipe(data=f"hfds/{folder}"))


def hidden(folder):
    features = {"image": datasets.Image(), "label": CLASS}
    write(folder, "train", {"image": None, "label": LABELS}, features)
    write(folder, "validation", {"image": None, "label": LABELS}, features)
    write(folder, "test", {"image": None, "label": [-1] * 10}, features)
    return {"data": f"hfds/{folder}", "val_fraction": 0.2}


def test_hidden_test_labels_are_refused_with_the_way_round(folder):
    values = hidden(folder)
    with pytest.raises(UserError, match=r"test images have no labels .*test_split=validation"):
        open_data(Recipe(**values))
    data = open_data(Recipe(**values, test_split="validation"))
    assert [len(data.train), len(data.val), len(data.test)] == [8, 2, 10]
    assert not set(data.val.rows.tolist()) & set(data.train.rows.tolist())
    data = open_data(Recipe(**values, test_split="none"))
    assert (len(data.val), data.test) == (10, None)


@pytest.mark.parametrize(
    ("splits", "shared"),
    [
        ({"train_split": "train[:80%]", "test_split": "train[80%:]"}, False),
        ({"train_split": "train[:80%]", "test_split": "train[70%:]"}, True),
        ({"train_split": "train", "test_split": "train[:10%]"}, True),
        ({"train_split": "train+validation", "test_split": "validation"}, True),
        ({"val_split": "validation", "test_split": "validation"}, True),
        ({"test_split": "train"}, True),
    ],
)
def test_no_row_is_in_two_splits(folder, splits, shared):
    recipe = Recipe(**hidden(folder), **splits)
    if shared:
        with pytest.raises(UsageError, match="would share images"):
            open_source(recipe)
    else:
        source = open_source(recipe)
        assert [len(source.train), len(source.test)] == [8, 2]


def test_faults_of_files_and_names_are_one_sentence(folder):
    (folder / "train-0.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="Cannot open") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    (folder / "train-0.parquet").unlink()
    with pytest.raises(UserError, match="Cannot open"):
        opened(folder)
    features = {"image": datasets.Image(), "label": CLASS}
    write(folder, "train", {"image": None, "label": LABELS}, features)
    with pytest.raises(UserError, match="has no split 'dev'; it has train"):
        opened(folder, test_split="dev")
    write(
        folder,
        "train",
        {"image": [3] * 10, "label": LABELS},
        {"image": datasets.Value("int64"), "label": CLASS},
    )
    with pytest.raises(UserError, match="Cannot open"):
        opened(folder)


def test_pixels_are_those_of_every_reader(folder):
    """A turned and a 16-bit picture, through parquet."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    deep = folder / "deep.png"
    Image.fromarray(values.astype(np.uint16) * 257).save(deep)
    lying = folder / "lying.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).transpose(Image.Transpose.ROTATE_90).save(lying, exif=exif)
    pictures = [{"bytes": path.read_bytes(), "path": None} for path in (deep, lying)]
    features = {"image": datasets.Image(), "label": CLASS}
    write(folder, "train", {"image": pictures, "label": [0, 1]}, features)
    split = opened(folder, in_chans=1).train
    for position in range(2):
        assert np.array_equal(np.asarray(split.image(position)), values)
