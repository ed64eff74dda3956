"""What a folder of images may be, and what is refused or left out with a word."""

import os
import shutil
import tarfile

import pytest
from PIL import Image

from timm_xformers.data.data import open_data
from timm_xformers.data.digest import changes, describe
from timm_xformers.data.sources import open_source
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe


@pytest.fixture
def root(tmp_path):
    return tmp_path / "d"


def fill(folder, count=10, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}{suffix}")


def opened(root, used=("train", "val", "test"), **values):
    return open_source(Recipe(data="folder", data_dir=str(root), **values), used)


def sizes(source):
    return [None if s is None else len(s) for s in (source.train, source.val, source.test)]


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["test", "Test", "TESTING"])
def test_parts_in_any_case(root, train, test):
    for name in ("cat", "dog"):
        fill(root / train / name)
        fill(root / test / name, 4)
    source = opened(root)
    assert sizes(source) == [20, None, 8]
    assert source.class_names == ("cat", "dog")
    assert source.notes == ()


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION", "eval"])
def test_a_validation_part_in_any_case(root, name):
    for part, count in (("train", 10), (name, 4), ("Test", 3)):
        for label in ("cat", "dog"):
            fill(root / part / label, count)
    assert sizes(opened(root)) == [20, 8, 6]
    # none: no test set, and the validation part stays what it is.
    assert sizes(opened(root, test_split="none")) == [20, 8, None]


def test_two_parts_that_differ_in_case_alone_are_refused(root):
    for part in ("Train", "train"):
        for label in ("cat", "dog"):
            fill(root / part / label)
    if len(os.listdir(root)) == 1:
        pytest.skip("needs a file system that tells cases apart")
    with pytest.raises(UserError, match="has both Train and train; rename"):
        opened(root)


def test_the_class_is_the_first_folder_however_deep(root):
    fill(root / "cat" / "day" / "1")
    fill(root / "cat" / "night")
    fill(root / "dog" / "day")
    source = opened(root)
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.bincount().tolist() == [20, 10]


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_lone_folder_around_the_others_is_looked_into(root, inner):
    for name in ("cat", "dog"):
        fill(root / "pets-1.0" / "images" / inner / name)
    assert opened(root).class_names == ("cat", "dog")


def test_classes_without_test_images_are_named(root):
    for part, names in (("train", "abc"), ("test", "b")):
        for name in names:
            fill(root / part / name, suffix=f"-{part}.bmp")
    recipe = Recipe(data="folder", data_dir=str(root), img_size=8)
    note = open_data(recipe).notes[-1]
    assert note == "no test images of 2 of 3 classes (a, c)"
    assert note.kept == "no test images of 2 of 3 classes"
    fill(root / "test" / "a")
    fill(root / "test" / "c")
    assert not any("no test images" in note for note in open_data(recipe).notes)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_left_out_is_counted_in_one_line(root, packed, tmp_path):
    for name in ("cat", "dog"):
        fill(root / name)
    fill(root / ".ipynb_checkpoints", 3)
    fill(root / "cat" / ".thumbs", 3)
    fill(root / "__MACOSX" / "cat", 3)
    fill(root, 6)
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "cat" / "Thumbs.db").touch()
    (root / "cat" / "notes.txt").touch()
    (root / "dog" / "clip.mp4").touch()
    if packed:
        with tarfile.open(tmp_path / "d.tar", "w") as tar:
            tar.add(root, arcname=".")
        root = tmp_path / "d.tar"
    source = opened(root)
    assert source.class_names == ("cat", "dog")
    assert len(source.train) == 20
    (line,) = source.notes
    assert line == (
        "left out: 3 hidden folders (.ipynb_checkpoints, __MACOSX, cat/.thumbs); 6 images beside "
        "the class folders (0.png, 1.png, 2.png, ...); 2 files that are no pictures by their names "
        "(1 .txt, 1 .mp4)"
    ).replace("1 .txt, 1 .mp4", line.rpartition("(")[2][:-1])
    assert {*line.rpartition("(")[2][:-1].split(", ")} == {"1 .txt", "1 .mp4"}


KINDS = [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif"]


def test_every_kind_that_pillow_reads_is_read_and_counted(root):
    for name in ("cat", "dog"):
        for suffix in KINDS:
            fill(root / name, 2, suffix)
    source = opened(root)
    assert len(source.train) == 2 * 2 * len(KINDS)
    (line,) = source.notes
    assert all(f"4 {suffix.lower()}" in line for suffix in KINDS)
    for position in range(len(source.train)):
        assert source.train.image(position).size == (8, 8)


def test_folders_beside_the_parts_are_named(root):
    for name in ("cat", "dog"):
        fill(root / "train" / name)
    fill(root / "test", 5)  # a competition's, without labels
    fill(root / "raw")
    fill(root, 1)
    source = opened(root)
    assert sizes(source) == [20, None, None]
    assert source.notes == (
        "left out: 2 folders that are no part with class folders (raw, test); 1 image beside the "
        "parts (0.png)",
    )


def test_one_of_a_kind_is_said_in_the_singular(root):
    for name in ("train/cat", "train/dog", "test", "train/.thumbs"):
        fill(root / name)
    (root / "train" / "cat" / "notes.txt").touch()
    (root / "train" / "cat" / "far.png").symlink_to(root / "nowhere.png")
    (line,) = opened(root).notes
    assert line == (
        "left out: 1 folder that is no part with class folders (test); 1 hidden folder (.thumbs); "
        "1 broken link, pipe or the like (cat/far.png); 1 file that is no picture by its name "
        "(1 .txt)"
    )


def test_a_class_may_be_called_train(root):
    for name in ("train", "bus", "car"):
        fill(root / name)
    assert opened(root).class_names == ("bus", "car", "train")


def test_test_images_are_never_trained_on(root):
    for name in ("cat", "dog"):
        fill(root / name)
        fill(root / "Test" / name, 3)
    assert sizes(opened(root)) == [20, None, 6]
    shutil.rmtree(root / "cat")
    shutil.rmtree(root / "dog")
    with pytest.raises(UserError, match="has Test and no part for training"):
        opened(root)
    assert sizes(opened(root, ["test"])) == [None, None, 6]


def test_flat_parts_without_labels_are_refused(root):
    fill(root / "train")
    fill(root / "test")
    with pytest.raises(UserError, match=r"form one class.*--labels FILE[.]csv"):
        opened(root)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"test_split": "train"}, "train and test would share"),
        ({"val_split": "test", "test_split": "test"}, "would share"),
        ({"test_split": "train/cat"}, "would share"),
        ({"val_split": "link"}, "would share"),
        ({"train_split": "."}, "would share"),
    ],
)
def test_the_same_images_are_never_two_parts(root, values, words):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            fill(root / part / name)
    (root / "link").symlink_to(root / "test")
    with pytest.raises(UsageError, match=words):
        opened(root, **values)


def test_links_pipes_and_circles_do_not_hang(root):
    for name in ("cat", "dog"):
        fill(root / name)
    (root / "cat" / "up").symlink_to(root, target_is_directory=True)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "linked.png").symlink_to(root / "dog" / "0.png")
    os.mkfifo(root / "dog" / "pipe.png")
    source = opened(root)
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.bincount().tolist() == [10, 11]
    assert "3 broken links, pipes and the like" in source.notes[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(root):
    fill(root / "cat")
    fill(root / "dog")
    (root / "dog").chmod(0)
    with pytest.raises(UserError, match=r"Cannot read the folder .*dog: Permission denied"):
        opened(root)
    (root / "dog").chmod(0o700)


def test_names_that_are_no_utf8_or_do_harm(root):
    fill(root / os.fsdecode(b"caf\xe9"))
    fill(root / "\x1b[31mred")
    fill(root / "=1+2|x")
    source = opened(root)
    assert source.class_names == (r"\x1b[31mred", "=1+2|x", r"caf\xe9")
    for name in source.class_names:
        name.encode("utf-8")
    source.train.name(29).encode("utf-8")


def test_a_tar_of_tars(root, tmp_path):
    for name in ("cat", "dog"):
        fill(root / name)
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in sorted((root / name).iterdir()):
                tar.add(path, arcname=path.name)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("cat", "dog"):
            tar.add(tmp_path / f"{name}.tar", arcname=f"{name}.tar")
    packed, plain = opened(tmp_path / "all.tar"), opened(root)
    assert packed.class_names == plain.class_names
    assert packed.train.digest() == plain.train.digest()
    for position in (0, 13, 19):
        assert packed.train.image(position).tobytes() == plain.train.image(position).tobytes()


def test_parts_in_a_tar_are_parts(root, tmp_path):
    for part in ("Train", "Test"):
        for name in ("cat", "dog"):
            fill(root / part / name)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, arcname="set")
    assert sizes(opened(tmp_path / "set.tar")) == [20, None, 20]


def test_a_damaged_tar_is_named(root, tmp_path):
    for name in ("cat", "dog"):
        fill(root / name)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(root, arcname="set")
    with pytest.raises(UserError, match=r"Cannot open .*z.tar: .*uncompressed tar"):
        opened(tmp_path / "z.tar")


def test_the_digest_tells_whether_images_came_went_or_changed_class(root):
    for name in ("cat", "dog"):
        fill(root / name)

    def summary(place=root):
        return describe(open_data(Recipe(data="folder", data_dir=str(place))))

    before = summary()
    assert set(before["splits"]) == {"train", "val"}
    moved = root.with_name("moved")
    shutil.copytree(root, moved)
    assert summary(moved) == before
    (root / "cat" / "0.png").rename(root / "cat" / "renamed.png")
    assert changes(before, summary()) == (
        "other names or labels among the 18 train images; other names or labels among the 2 val "
        "images"
    )
    (root / "cat" / "renamed.png").rename(root / "cat" / "0.png")
    assert changes(before, summary()) == ""
    shutil.copy(root / "cat" / "1.png", root / "cat" / "11.png")
    assert changes(before, summary()).startswith("19 train images instead of 18")
    more = summary()
    (root / "cat" / "11.png").rename(root / "dog" / "11.png")
    assert "other names or labels" in changes(more, summary())
