"""Labels from a CSV file beside a folder of pictures."""

import pytest
from PIL import Image

from timm_xformers.data.sources import open_source
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe


@pytest.fixture
def root(tmp_path):
    """A competition's download: labelled training pictures, others for the hand-in."""
    for part, names in (("train", "abcdef"), ("test", "xyz")):
        (tmp_path / "d" / part).mkdir(parents=True)
        for number, name in enumerate(names):
            image = Image.new("RGB", (8, 8), (10 * number, 0, 0))
            image.save(tmp_path / "d" / part / f"{name}.0.jpg")
    return tmp_path / "d"


def opened(root, text, **values):
    (root / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(Recipe(data="folder", data_dir=str(root), labels="train.csv", **values))


def found(split, names):
    return {split.name(i)[-7]: names[split.labels[i]] for i in range(len(split))}


EXPECTED = dict(zip("abcdef", ["cat", "dog"] * 3, strict=True))


@pytest.mark.parametrize("titles", ["id,label\n", "image,breed\n", "Id,Category\n", ""])
@pytest.mark.parametrize(
    "form", ["{}.0", "{}.0.jpg", "train/{}.0.jpg", "./train/{}.0", "train\\{}.0"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_usual_form(root, titles, form, end):
    lines = [f"{form.format(name)},{label}" for name, label in EXPECTED.items()]
    source = opened(root, (titles + "\n".join(lines)).replace("\n", end))
    assert source.class_names == ("cat", "dog")
    assert found(source.train, source.class_names) == EXPECTED
    assert source.test is None
    (line,) = source.notes
    assert line == ("left out: 3 images that train.csv does not name (x.0.jpg, y.0.jpg, z.0.jpg)")
    assert line.kept == "left out: 3 images that train.csv does not name"


def test_other_columns_marks_and_signatures(root):
    rows = [f"{i};{name}.0.jpg;{label};0.5" for i, (name, label) in enumerate(EXPECTED.items())]
    text = "nr;file_name;label;area\n" + "\n".join(rows)
    source = opened(root, b"\xef\xbb\xbf" + text.encode())
    assert found(source.train, source.class_names) == EXPECTED
    tabs = opened(root, "\n".join(f"{name}.0\t{label}" for name, label in EXPECTED.items()))
    assert found(tabs.train, tabs.class_names) == EXPECTED


def test_numbers_are_ordered_as_numbers(root):
    labels = dict(zip("abcdef", ["10", "2", "1", "10", "2", "1"], strict=True))
    source = opened(root, "id,label\n" + "\n".join(f"{k}.0,{v}" for k, v in labels.items()))
    assert source.class_names == ("1", "2", "10")
    assert found(source.train, source.class_names) == labels


def test_pictures_of_the_test_part_are_for_the_test(root):
    named = {**EXPECTED, "x": "cat", "y": "dog"}
    source = opened(root, "id,label\n" + "\n".join(f"{k}.0,{v}" for k, v in named.items()))
    assert [len(source.train), len(source.test)] == [6, 2]
    assert found(source.test, source.class_names) == {"x": "cat", "y": "dog"}


def test_pictures_right_in_the_folder(root):
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train").rmdir()
    source = opened(root, "\n".join(f"{k}.0,{v}" for k, v in EXPECTED.items()))
    assert found(source.train, source.class_names) == EXPECTED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,label\na.0,cat\nq.0,dog\n", r"names 1 images that are not in the folder, such as q.0"),
        ("q.0.jpg,cat\na.0,dog\n", r"names 1 images that are not in the folder, such as q.0.jpg"),
        ("id,label\na.0,cat\na.0.jpg,dog\n", r"calls a.0.jpg cat and dog; keep one line"),
        ("id,label\na.0,\nb.0,dog\n", r"entry 2 has no class"),
        ("id,label\na.0\nb.0,dog\n", r"entry 2 has no class"),
        ("cat,dog,id\n1,0,a.0\n1,0\n", "entry 3 has no class"),
        ("id,x,y\na.0,1,2\n", r"has 3 columns \(id, x, y\), and it is open which"),
        ("a.0\nb.0\n", "has no two columns"),
        ("", "has no two columns"),
        (b"id,label\na.0,caf\xe9\n", "is no CSV file in UTF-8"),
    ],
)
def test_faults_are_one_sentence(root, text, words):
    with pytest.raises(UserError, match=words):
        opened(root, text)


def test_a_column_for_each_class(root):
    for one, none in (("1", "0"), ("1.0", "0.0")):
        lines = [f"{k}.0,{one},{none}" if v == "dog" else f"{k}.0,{none},{one}"
                 for k, v in EXPECTED.items()]  # fmt: skip
        source = opened(root, "image,dog,cat\n" + "\n".join(lines))
        assert source.class_names == ("cat", "dog")
        assert found(source.train, source.class_names) == EXPECTED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,label\na.0,cat\nb.0,dog\nc.0,cat dog\n", "'cat dog', a list of 2"),
        ("id,label\na.0,1\nb.0,2\nc.0,2 1\n", "'2 1', a list of 2"),
        ('id,label\na.0,cat\nb.0,dog\nc.0,"dog, cat"\n', "'dog, cat', a list of 2"),
        ("id,label\na.0,cat;dog\nb.0,fox;cow;dog\n", "'(cat;dog|fox;cow;dog)', a list of"),
        ("id,label\na.0,cat|dog\nb.0,dog\n", "a list of 2"),
        ("id,label\na.0,cat\na.0,dog\n", "calls a.0.jpg cat and dog"),
        ("id,label\na.0,cat\nb.0,cat,dog\n", "entry 3 has 3 columns and the first line 2"),
        ("a.0,cat\nb.0,cat,dog\n", "entry 2 has 3 columns and the first line 2"),
        ("id,cat,dog\na.0,1,1\nb.0,0,1\n", "gives a.0 the classes cat, dog"),
        ("id,cat,dog\na.0,1,0\nb.0,0,0\n", "gives b.0 no class"),
        ("id,cat,dog\na.0,1,0\nb.0,0,0,1\n", "gives b.0 no class"),
    ],
)
def test_several_classes_a_picture_are_refused_with_the_reason(root, text, words):
    with pytest.raises(UserError, match=words) as error:
        opened(root, text)
    assert "multi-label" in str(error.value) or "quotation marks" in str(error.value)


SEVERAL = {"a": "cat dog", "b": "", "c": "dog", "d": "cat", "e": "cow", "f": "cat cow dog"}


def marks(source):
    """Names of each picture's classes."""
    split, names = source.train, source.class_names
    return {
        split.name(i)[-7]: " ".join(n for n, m in zip(names, split.labels[i], strict=True) if m)
        for i in range(len(split))
    }


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("id,tags\n" + "".join(f"{k}.0,{v}\n" for k, v in SEVERAL.items()), "with spaces"),
        (
            "id;label\n"
            + "".join(f"{k}.0;{v.replace(' ', ' | ')}\n" for k, v in reversed(SEVERAL.items())),
            "with bars",
        ),
        (
            "id,label,area\n"
            + "".join(f"{k}.0,{v.replace(' ', ';')},0.5\n" for k, v in SEVERAL.items()),
            "with semicolons",
        ),
        (
            "id,label\n" + "".join(f'{k}.0,"{v.replace(" ", ", ")}"\n' for k, v in SEVERAL.items()),
            "with commas",
        ),
        (
            "id,dog,cow,cat\n"
            + "".join(
                f"{k}.0,{','.join(str(int(n in v)) for n in ('dog', 'cow', 'cat'))}\n"
                for k, v in SEVERAL.items()
            ),
            "columns of 0 and 1",
        ),
    ],
)
def test_several_classes_in_every_form_that_was_asked_for(root, text, form):
    source = opened(root, text, multi_label=True, loss="bce")
    assert source.class_names == ("cat", "cow", "dog")
    assert marks(source) == SEVERAL
    note = source.notes[0]
    assert note.startswith("several classes a picture, from ")
    assert form in note
    assert note.endswith(
        ": 3 classes (cat, cow, dog), 1.33 a picture, 3 at most, 1 picture with none"
    )
    assert "cat" not in note.kept


def test_names_with_spaces_between_bars_and_columns_of_nothing(root):
    text = "id,label\na.0,ice cream|hot dog\nb.0,hot dog\n"
    source = opened(root, text, multi_label=True, loss="bce")
    assert source.class_names == ("hot dog", "ice cream")
    source = opened(root, "id,cat,dog,cow\na.0,1,1,0\nb.0,0,0,0\n", multi_label=True, loss="bce")
    assert source.class_names == ("cat", "dog")
    assert "1 column of train.csv without a 1 (cow)" in " ".join(source.notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,label\na.0,cat|dog\nb.0,cat;dog\n", "has bars and semicolons between classes"),
        ("id,label\na.0,\"['cat', 'dog']\"\nb.0,cat\n", "write the classes as cat|dog"),
        ("id,label\na.0,cat dog\na.0,cat\n", "calls a.0.jpg cat|dog and cat"),
        ("id,label\na.0,cat dog\nb.0\n", "entry 3 has no class"),
        ("id,cat,dog\na.0,1,1\nb.0,1\n", "entry 3 has 2 columns and the first line 3"),
        ("id,cat,cat\na.0,1,1\nb.0,1,0\n", "two of one name"),
        ("id,label\na.0,cat\nb.0,cat,dog\n", "entry 3 has 3 columns and the first line 2"),
        ("id,cat,dog\na.0,1,-1\nb.0,1,0\n", "it is open which has the classes"),
        ("id,cat,dog\na.0,1,0\nzz,1,0\n", "names 1 images that are not in the folder"),
    ],
)
def test_labels_that_could_mean_two_things_are_refused(root, text, words):
    with pytest.raises(UserError) as error:
        opened(root, text, multi_label=True, loss="bce")
    assert words in str(error.value)


def test_names_of_several_words_are_names(root):
    labels = ["hot dog", "ice cream", "dog", "hot dog", "ice cream", "tench, Tinca tinca"]
    rows = [f'{k}.0,"{v}"' for k, v in zip("abcdef", labels, strict=True)]
    assert set(opened(root, "id,label\n" + "\n".join(rows)).class_names) == {*labels}


def test_words_that_names_share_are_mentioned(root):
    labels = ["haze primary", "clear primary", "clear, water", "cloudy", "haze primary", "cloudy"]
    rows = [f'{k}.0,"{v}"' for k, v in zip("abcdef", labels, strict=True)]
    note = opened(root, "id,label\n" + "\n".join(rows)).notes[-1]
    assert note == (
        "3 names of classes share words, and each whole text is one class: such as 'clear primary' "
        "and 'clear, water'"
    )
    assert note.kept == "3 names of classes share words, and each whole text is one class"


def test_a_name_that_means_two_pictures_is_refused(root):
    for folder, name in (("deep", "a"), ("deeper", "b")):
        (root / "train" / folder).mkdir()
        (root / "train" / f"{name}.0.jpg").rename(root / "train" / folder / "b.0.jpg")
    with pytest.raises(UserError, match=r"entry 2: b.0 can be .*write paths"):
        opened(root, "id,label\nb.0,cat\nc.0,dog\n")
    source = opened(root, "id,label\ndeep/b.0,cat\nc.0,dog\ntrain/deeper/b.0,dog\n")
    assert len(source.train) == 3


def test_a_label_file_that_is_not_there_or_of_no_use(root):
    with pytest.raises(UserError, match=r"--labels none[.]csv is no file"):
        open_source(Recipe(data="folder", data_dir=str(root), labels="none.csv"))
    with pytest.raises(UsageError, match="drop it for digits"):
        open_source(Recipe(labels="train.csv"))


def test_where_the_file_lies_does_not_change_the_hash():
    assert Recipe(labels="/a/l.csv").digest == Recipe(labels="b/l.csv").digest
    assert Recipe(labels="m.csv").digest != Recipe(labels="l.csv").digest != Recipe().digest
