"""results.csv: one row for every finished epoch."""

import csv
import dataclasses
import io
from pathlib import Path

from timm_xformers.files.atomic import write_text

__all__ = ["EpochRow", "read_history", "write_history"]


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
        val_loss: Cross-entropy on the validation images.
        val_top1_percent: Accuracy on them.
        val_top5_percent: The same, five guesses allowed.
        train_seconds: Wall time of the training part.
        train_images: Images trained on, all processes together.
        wait_seconds: Part of train_seconds spent waiting for data.
        cpu_seconds: Processor time in train_seconds, of all threads of the first process.
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


def write_history(path: Path, rows: list[EpochRow]) -> None:
    """Replace the file by these rows."""
    names = [field.name for field in dataclasses.fields(EpochRow)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({k: "" if v is None else repr(v) for k, v in values.items()})
    write_text(path, text.getvalue())


def read_history(path: Path) -> list[EpochRow]:
    """Read what `write_history` wrote; no file is no rows."""
    if not path.exists():
        return []
    whole = {"epoch", "train_images"}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            EpochRow(**{k: _number(v, k in whole) for k, v in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def _number(text: str, whole: bool) -> int | float | None:
    if not text:
        return None
    return int(text) if whole else float(text)
