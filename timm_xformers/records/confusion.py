"""Which class is taken for which: per_class.csv and confusion.png."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_xformers.files.figures import literal, new_figure, save
from timm_xformers.files.tables import write_csv
from timm_xformers.records.results_json import wilson_interval

__all__ = ["ClassRow", "class_rows", "plot_confusion", "write_class_rows"]

# Beyond these a picture of the usual size cannot be read.
MOST_NAMES = 40
MOST_COUNTS = 15
# More rows than this are averaged in blocks: a picture has no more pixels to show them.
MOST_CELLS = 1000


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """Figures of one class. None: no image to judge by.

    Attributes:
        label: Number of the class.
        class_name: Its name, or its number where it has none.
        images: Images of the class.
        correct: Those the model names right.
        recall_percent: Share of them.
        recall_low_percent: Lower end of its 95 % Wilson interval.
        recall_high_percent: Upper end of it.
        precision_percent: Of all images given this class, the share that belongs to it.
        most_confused_with: What most of its wrong images were taken for; the first among equals.
        most_confused_images: How many those are.
    """

    label: int
    class_name: str
    images: int
    correct: int
    recall_percent: float | None
    recall_low_percent: float | None
    recall_high_percent: float | None
    precision_percent: float | None
    most_confused_with: str | None
    most_confused_images: int


def class_rows(confusion: Tensor, class_names: Sequence[str]) -> list[ClassRow]:
    """Figures of every class, by label.

    Args:
        confusion: Images by label (rows) and answer (columns), sparse and coalesced (C, C): with
            20,000 classes a dense matrix would take gigabytes.
        class_names: By label; empty if the classes have none.
    """
    names = _names(confusion.shape[0], class_names)
    images, answers = (confusion.sum(dim).to_dense().tolist() for dim in (1, 0))
    correct = [0] * len(names)
    worst: list[tuple[int, int | None]] = [(0, None)] * len(names)
    for (label, answer), count in _cells(confusion):
        # Answers of a label ascend, so the first among equals stays.
        if label == answer:
            correct[label] = count
        elif count > worst[label][0]:
            worst[label] = (count, answer)
    rows = []
    for label, (seen, given, right) in enumerate(zip(images, answers, correct, strict=True)):
        low, high = wilson_interval(right, seen) if seen else (None, None)
        count, other = worst[label]
        rows.append(
            ClassRow(
                label=label,
                class_name=names[label],
                images=seen,
                correct=right,
                recall_percent=_percent(right / seen if seen else None),
                recall_low_percent=_percent(low),
                recall_high_percent=_percent(high),
                precision_percent=_percent(right / given if given else None),
                most_confused_with=None if other is None else names[other],
                most_confused_images=count,
            )
        )
    return rows


def write_class_rows(path: Path, rows: list[ClassRow]) -> None:
    """Write per_class.csv; empty cells are what could not be measured."""
    names = [field.name for field in dataclasses.fields(ClassRow)]
    write_csv(path, map(dataclasses.asdict, rows), names)


def plot_confusion(path: Path, confusion: Tensor, class_names: Sequence[str], title: str) -> None:
    """Draw the matrix, each row as shares of the class's images.

    Names stand on the axes and counts in the cells while there is room; with more classes, errors
    are what the colour scale is for: it is the square root of the share, so that 1 % is visible.
    The arguments are those of `class_rows`.
    """
    from matplotlib.colors import PowerNorm

    num_classes = confusion.shape[0]
    names = [literal(name, 24) for name in _names(num_classes, class_names)]
    step = -(-num_classes // MOST_CELLS)
    width = -(-num_classes // step)
    counts = torch.sparse_coo_tensor(
        confusion.indices() // step,
        confusion.values(),
        (width, width),
        check_invariants=True,
    ).to_dense()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)

    named = num_classes <= MOST_NAMES
    side = min(max(4.5, 0.42 * num_classes), 11) if named else 9
    longest = max(map(len, names)) if named else 0
    figure = new_figure(side + 1.6 + 0.07 * longest, side + 0.6 + 0.07 * longest)
    axes = figure.subplots()
    edge = num_classes - 0.5
    picture = axes.imshow(
        100 * shares.numpy(),
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        interpolation="nearest",
        extent=(-0.5, edge, edge, -0.5),
    )
    figure.colorbar(
        picture,
        label="share of the class's images (%), square-root scale",
        ticks=[0, 1, 5, 10, 25, 50, 75, 100],
        shrink=0.8,
    )
    axes.set_title(literal(title, 200), wrap=True, fontsize=10)
    axes.set_xlabel("answer" if named else "answer (label)")
    axes.set_ylabel("class" if named else "class (label)")
    if named:
        ticks = list(range(num_classes))
        axes.set_xticks(ticks, names, fontsize=8, rotation=90 if longest > 3 else 0)
        axes.set_yticks(ticks, names, fontsize=8)
    if num_classes <= MOST_COUNTS:
        for (label, answer), count in _cells(confusion):
            # Half of the way on the colour scale is a quarter of the images.
            colour = "white" if shares[label, answer] > 0.3 else "black"
            axes.text(answer, label, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    elif not named:
        # A single wrong image among many classes is less than a pixel wide without a guide.
        axes.grid(color="0.5", alpha=0.2, linewidth=0.5)
        axes.set_axisbelow(False)
    save(figure, path)


def _cells(confusion: Tensor) -> Iterator[tuple[tuple[int, int], int]]:
    return zip(confusion.indices().T.tolist(), confusion.values().tolist(), strict=True)


def _names(num_classes: int, class_names: Sequence[str]) -> list[str]:
    """Names by label; a model wider than the data has labels without a name."""
    return [*class_names, *map(str, range(len(class_names), num_classes))][:num_classes]


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)
