"""results.csv: one row for every finished epoch."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from timm_xformers.files.atomic import write_text

__all__ = ["EpochRow", "read_history", "write_history"]

# Of one class an image, of several, and of none: what is empty in all rows has no columns.
KINDS = (
    ("train_top1_percent", "val_top1_percent", "val_top5_percent"),
    ("val_map_percent", "val_f1_micro_percent", "val_f1_macro_percent"),
    ("train_agreement_percent", "val_agreement_percent"),
)


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """Figures of one epoch; validation is empty where there are no validation images.

    Attributes:
        epoch: Counted from 1.
        lr: Largest learning rate at the end of the epoch.
        train_loss: Mean training loss, on augmented images and with smoothed or mixed labels; of a
            model with a teacher, the loss against that.
        train_top1_percent: Accuracy on them, before each update; empty where single layers were
            aligned with a teacher's.
        val_loss: Cross-entropy on the validation images; without labels, Kullback-Leibler
            divergence from the teacher.
        val_top1_percent: Accuracy on them.
        val_top5_percent: The same, five guesses allowed.
        train_seconds: Wall time of the training part.
        train_images: Images trained on, all processes together.
        wait_seconds: Part of train_seconds spent waiting for data.
        cpu_seconds: Processor time in train_seconds, of all threads of the first process.
        val_map_percent: With several classes an image: mean average precision, in the place of
            top1 and top5, whose columns such a file has not, as others have not these.
        val_f1_micro_percent: F1 of all marks.
        val_f1_macro_percent: Mean over classes of F1.
        train_agreement_percent: Without labels, in the place of top1: images that got the teacher's
            class.
        val_agreement_percent: The same of the validation images.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1_percent: float | None
    val_loss: float | None
    val_top1_percent: float | None
    val_top5_percent: float | None
    train_seconds: float
    train_images: int
    wait_seconds: float
    cpu_seconds: float | None = None
    val_map_percent: float | None = None
    val_f1_micro_percent: float | None = None
    val_f1_macro_percent: float | None = None
    train_agreement_percent: float | None = None
    val_agreement_percent: float | None = None

    @property
    def right_percent(self) -> float | None:
        """Right answers in training, by labels or teacher; None while layers are aligned."""
        by_teacher = self.train_agreement_percent
        return by_teacher if self.train_top1_percent is None else self.train_top1_percent


def write_history(path: Path, rows: list[EpochRow]) -> None:
    """Replace the file by these rows."""
    names = [field.name for field in dataclasses.fields(EpochRow)]
    for kind in KINDS:
        if rows and all(getattr(row, name) is None for row in rows for name in kind):
            names = [name for name in names if name not in kind]
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({k: "" if values[k] is None else repr(values[k]) for k in names})
    write_text(path, text.getvalue())


def read_history(path: Path) -> list[EpochRow]:
    """Read what `write_history` wrote; no file is no rows."""
    if not path.exists():
        return []
    whole = {"epoch", "train_images"}
    absent: dict[str, Any] = {name: None for kind in KINDS for name in kind}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            EpochRow(**absent | {k: _number(v, k in whole) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def _number(text: str, whole: bool) -> int | float | None:
    if not text:
        return None
    return int(text) if whole else float(text)
