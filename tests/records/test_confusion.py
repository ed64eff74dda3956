"""Which class is taken for which: the counts, their table and their picture."""

import csv

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from timm_xformers.cli import main
from timm_xformers.data.memory import MemoryBatches
from timm_xformers.records.confusion import class_rows, plot_confusion, write_class_rows
from timm_xformers.records.results_json import wilson_interval
from timm_xformers.training.devices import make_accelerator
from timm_xformers.training.metrics import evaluate_model
from timm_xformers.training.train import train


def counts(labels, answers, num_classes):
    cells = torch.stack([torch.as_tensor(labels), torch.as_tensor(answers)])
    ones = torch.ones_like(cells[0])
    size = (num_classes, num_classes)
    return torch.sparse_coo_tensor(cells, ones, size, check_invariants=True).coalesce()


def random_answers(num_classes, images=400):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (images,), generator=generator)
    wrong = torch.randint(num_classes, (images,), generator=generator)
    right = torch.rand(images, generator=generator) < 0.7
    return labels, torch.where(right, labels, wrong)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures = []
    original = Figure.savefig

    def save(figure, *args, dpi, **kwargs):
        figures.append(figure)
        original(figure, *args, dpi=30, **kwargs)  # what takes the time is pixels

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def test_evaluation_counts_what_scikit_learn_counts():
    labels, answers = random_answers(7)

    class Oracle(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 9).float()

    batches = MemoryBatches(
        answers[:, None, None, None].byte(),
        labels,
        mean=[0.0],
        std=[1 / 255],
        device=torch.device("cpu"),
    )
    metrics = evaluate_model(Oracle(), batches, 32, make_accelerator("no"))
    expected = confusion_matrix(labels, answers, labels=range(9))  # as wide as the classifier
    assert metrics.confusion.to_dense().tolist() == expected.tolist()
    assert int(metrics.confusion.values().sum()) == metrics.images == 400


def test_classes_have_the_figures_of_scikit_learn():
    labels, answers = random_answers(7)
    rows = class_rows(counts(labels, answers, 7), list("abcdefg"))
    matrix = confusion_matrix(labels, answers)
    recall = 100 * recall_score(labels, answers, average=None)
    precision = 100 * precision_score(labels, answers, average=None)
    for row in rows:
        assert row.recall_percent == pytest.approx(recall[row.label], abs=0.006)
        assert row.precision_percent == pytest.approx(precision[row.label], abs=0.006)
        assert (row.images, row.correct) == (matrix[row.label].sum(), matrix[row.label, row.label])
        low, high = wilson_interval(row.correct, row.images)
        assert row.recall_low_percent == pytest.approx(100 * low, abs=0.006)
        assert row.recall_high_percent == pytest.approx(100 * high, abs=0.006)
        others = matrix[row.label].copy()
        others[row.label] = 0
        assert row.most_confused_with == "abcdefg"[others.argmax()]
        assert row.most_confused_images == others.max()


def test_classes_without_images_or_errors_have_empty_cells(tmp_path):
    # Class 0 is right, 1 errs once each way, 2 has no image, 3 is no class of the data.
    rows = class_rows(counts([0, 1, 1], [0, 2, 0], 4), ["zero", "one, or so", "two"])
    write_class_rows(tmp_path / "c.csv", rows)
    with (tmp_path / "c.csv").open() as file:
        zero, one, two, three = csv.DictReader(file)
    assert (zero["most_confused_with"], zero["precision_percent"]) == ("", "50.0")
    assert (one["class_name"], one["recall_percent"]) == ("one, or so", "0.0")
    assert (one["most_confused_with"], one["precision_percent"]) == ("zero", "")
    assert (two["recall_percent"], two["recall_low_percent"], two["precision_percent"]) == (
        "", "", "0.0",
    )  # fmt: skip
    assert (three["class_name"], three["images"]) == ("3", "0")


@pytest.mark.parametrize(
    ("num_classes", "named", "counted"),
    [
        (2, True, True),
        (15, True, True),
        (40, True, False),
        (100, False, False),
        (2001, False, False),
    ],
)
def test_picture_says_as_much_as_can_be_read(tmp_path, drawn, num_classes, named, counted):
    names = [f"price {number} $" for number in range(num_classes)]
    confusion = counts(*random_answers(num_classes), num_classes)
    plot_confusion(tmp_path / "c.png", confusion, names, "title")
    axes = drawn[0].axes[0]
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert (ticks == [f"price {number} \\$" for number in range(num_classes)]) is named
    written = {text.get_text() for text in axes.texts}
    assert written == (set(map(str, confusion.values().tolist())) if counted else set())
    assert max(axes.images[0].get_array().shape) <= 1000
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_picture_are_shares(tmp_path, drawn):
    plot_confusion(tmp_path / "c.png", counts([0, 0, 0, 0, 1], [0, 0, 0, 1, 1], 3), (), "title")
    assert drawn[0].axes[0].images[0].get_array().tolist() == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]


def read_classes(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_run_describes_the_test_set_and_evaluation_repeats_it(tiny, capsys):
    folder, record = train(tiny(output="run", epochs=1))
    rows = read_classes(folder.per_class)
    assert [row["label"] for row in rows] == list("0123456789")
    assert sum(int(row["images"]) for row in rows) == 599
    right = sum(int(row["correct"]) for row in rows)
    assert record.test_top1_percent == pytest.approx(100 * right / 599, abs=1e-4)
    evaluate = ["evaluate", "--model", "local-dir:run/best", "--data", "digits"]
    assert main([*evaluate, "--details", "a/b"]) == 0
    again = folder.root.parent / "a" / "b"
    assert read_classes(again / "per_class.csv") == rows
    assert sorted(path.name for path in again.iterdir()) == ["confusion.png", "per_class.csv"]
    capsys.readouterr()
    assert main([*evaluate, "--details", "run/log.txt"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "run/log.txt" in said.err


def test_run_without_test_set_describes_validation(tiny, image_folder):
    (image_folder / "test").rename(image_folder.parent / "elsewhere")
    recipe = tiny(
        data="folder",
        data_dir=str(image_folder / "train"),
        img_size=16,
        batch_size=4,
        epochs=1,
        num_workers=0,
        val_fraction=0.25,
        output="run",
    )
    folder, record = train(recipe)
    assert record.test_images is None
    rows = read_classes(folder.per_class)
    assert [row["class_name"] for row in rows] == ["blue", "red"]
    assert sum(int(row["images"]) for row in rows) == record.val_images == 6
    assert folder.confusion.exists()
