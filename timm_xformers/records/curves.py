"""curves.png: loss and accuracy over the epochs, the kept one marked."""

from pathlib import Path

from timm_xformers.files.figures import (
    BLUE,
    COLOURS,
    VERMILION,
    literal,
    new_figure,
    ring,
    save,
    whole_numbers,
)
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.records.results_json import Record

__all__ = ["plot_curves"]

# The dashes help in print.
TRAIN = {"color": BLUE, "linestyle": "--", "label": "training"}
ALIGNMENT = {"color": COLOURS[2], "linestyle": ":", "label": "alignment of layers, relative error"}
VALIDATION = {"color": VERMILION, "linestyle": "-", "label": "validation"}


def plot_curves(path: Path, rows: list[EpochRow], record: Record) -> None:
    """Draw the history of a run, of at least one epoch, under the record's names and figures."""
    best_epoch = record.best_epoch or len(rows)
    title = f"{record.model} on {record.data}"
    headline = record.headline
    if (tested := record.percent("test")) is not None:
        title += f": {headline.word} {tested:.2f} % on {record.test_images} test images"
    figure = new_figure(10, 4)
    figure.suptitle(literal(title, 200))
    panels = figure.subplots(1, 2)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) == 1 else None
    series = (("Loss", "loss"), (f"{headline.words} (%)", f"{headline.key}_percent"))
    # With a teacher, first epochs may train single layers, whose errors are another quantity.
    aligned = sum(row.right_percent is None for row in rows) if record.teacher else 0
    for axes, (label, name) in zip(panels, series, strict=True):
        train, val = (
            [getattr(r, f"{part}_{name}", None) for r in rows] for part in ("train", "val")
        )
        if name == "loss" and aligned:
            axes.plot(epochs[:aligned], train[:aligned], marker="o", **ALIGNMENT)
        taught = name == "loss" and record.teacher
        trained = {**TRAIN, "label": "training, against the teacher"} if taught else TRAIN
        if None not in train[aligned:] and aligned < len(rows):
            alone = marker or ("o" if aligned == len(rows) - 1 else None)
            axes.plot(epochs[aligned:], train[aligned:], marker=alone, **trained)
        known = [value for value in val if value is not None]
        if known:
            axes.plot(epochs, known, marker=marker, **VALIDATION)
        axes.axvline(best_epoch, color="0.6", linewidth=1, zorder=0)
        if (best_value := (known or train)[best_epoch - 1]) is not None:
            label_best = f"kept: epoch {best_epoch}, {best_value:.4g}"
            ring(axes, best_epoch, best_value, color="black", label=label_best)
        axes.set_xlabel("Epoch")
        axes.set_ylabel(label)
        axes.set_xlim(0.5, len(rows) + 0.5)
        whole_numbers(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save(figure, path)
