"""What a run says: to log.txt, then to the terminal, with a progress bar if it is one."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from timm_xformers.recipe import Recipe
from timm_xformers.records.headline import MAP, headline_of
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.records.results_json import Record
from timm_xformers.training.session import Session
from timm_xformers.training.stages import sides

__all__ = ["RunLog", "epoch_line", "headline", "summary"]

# Between two lines on an epoch under way, where there is no terminal for a bar.
PROGRESS_SECONDS = 60.0


class RunLog:
    """Speaks for one run, on the main process.

    A terminal or pipe that is gone is left alone: the run goes on, and log.txt has every line.

    Args:
        log_path: File that receives every line; None writes none.
        total_steps: Batches of the whole run.
        done_steps: Batches of earlier sessions.
        done_share: Share of a budget that these have used.
        speaking: False for the other processes.
    """

    def __init__(
        self,
        log_path: Path | None,
        total_steps: int,
        done_steps: int,
        *,
        speaking: bool,
        done_share: float = 0.0,
    ) -> None:
        self.speaking, self.gone = speaking, sys.stderr is None
        self.log = log_path.open("a", encoding="utf-8") if log_path and speaking else None
        self.total_steps = total_steps
        self.start_steps, self.start_share = done_steps, done_share
        self.start = self.told = time.perf_counter()
        self.bar = tqdm(
            total=total_steps,
            initial=done_steps,
            unit="step",
            disable=self.gone or not (speaking and sys.stderr.isatty()),
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._show(self.bar.close)
        if self.log is not None:
            self.log.close()

    def say(self, text: str) -> None:
        """Log a line and show it, above the bar if there is one."""
        if not self.speaking:
            return
        if self.log is not None:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.log.flush()

        self.told = time.perf_counter()

        def write() -> None:
            self.bar.write(text, file=sys.stderr)
            sys.stderr.flush()

        self._show(write)

    def _show(self, action: Callable[[], object]) -> None:
        if self.gone:
            return
        try:
            action()
        except (OSError, ValueError):  # EIO of a closed terminal, EPIPE, a closed file
            self.gone = self.bar.disable = True
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # Else the interpreter tries to flush what is left, and complains.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def at(
        self, step: int, epoch: str, loss: float, right_percent: float | None, images_per_s: float
    ) -> None:
        """Move the bar to a step of the run; without one, say so once a minute, beside the log."""
        if not self.speaking or self.gone:
            return
        right = "" if right_percent is None else f"right {right_percent:.1f} %, "
        figures = f"loss {loss:.3f}, {right}{images_per_s:.0f} images/s"
        if not self.bar.disable:
            self.bar.set_description(epoch, refresh=False)
            self.bar.set_postfix_str(figures, refresh=False)
            self._show(lambda: self.bar.update(step - self.bar.n))
        elif time.perf_counter() - self.told > PROGRESS_SECONDS:
            self.told = time.perf_counter()
            text = f"{epoch}, step {step} of {self.total_steps}: {figures}"
            self._show(lambda: print(text, file=sys.stderr, flush=True))

    def remaining(self, step: int, spent_share: float = 0.0) -> str:
        """Words for the time that is left, judged by this session's steps, or use of a budget."""
        done = (step - self.start_steps) / max(self.total_steps - self.start_steps, 1)
        used = (spent_share - self.start_share) / max(1 - self.start_share, 1e-9)
        share = min(max(done, used, 1e-9), 1.0)
        seconds = (time.perf_counter() - self.start) * (1 - share) / share
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d}"


def headline(session: Session, root: Path) -> str:
    """What is about to be trained."""
    data = session.data
    sizes = (("training", data.train), ("validation", data.val), ("test", data.test))
    images = ", ".join(f"{len(split)} {name}" for name, split in sizes if split is not None)
    several = sides(session.stages)
    size = session.preprocessing.shape[1] if len(several) < 2 else " then ".join(map(str, several))
    teacher = session.trainer.teacher
    taught = "" if teacher is None else f", teacher {teacher.name}"
    return (
        f"{session.recipe.model}, {session.initial_weights}{taught}: {session.num_params:,} "
        f"parameters on {session.recipe.data} ({images} images of {size} px), "
        f"{session.accelerator.num_processes} x {session.accelerator.device.type}, into {root}"
    )


def epoch_line(row: EpochRow, recipe: Recipe, remaining: str) -> str:
    """How an epoch went."""
    text = f"epoch {row.epoch}/{recipe.epochs}  "
    if row.right_percent is not None:
        word = "agreement" if row.train_top1_percent is None else "top-1"
        text += f"loss {row.train_loss:.4f}  {word} {row.right_percent:.2f} %"
    elif recipe.teacher is None:
        text += f"loss {row.train_loss:.4f}"
    else:
        text += f"alignment: error {row.train_loss:.4f}"
    headline = headline_of(row)
    if row.val_loss is not None:
        percent = headline.of(row, "val")
        text += f"  validation: loss {row.val_loss:.4f}  {headline.word} {percent:.2f} %"
    return f"{text}  {row.train_images / row.train_seconds:.0f} images/s  {remaining} left"


def summary(record: Record) -> str:
    """How a run ended."""
    parts = [f"best epoch {record.best_epoch}" if record.epochs else "nothing was trained"]
    for name, split in (("validation", "val"), ("test", "test")):
        if figures := record.figures(split, beside=record.headline is MAP):
            parts.append(f"{name} {figures}")
        agreed, taught = (
            getattr(record, f"{split}_{figure}_percent") for figure in ("agreement", "teacher_top1")
        )
        if agreed is not None and taught is not None:
            parts.append(f"{agreed:.2f} % as the teacher, which has {taught:.2f} % right")
    if record.epochs:
        parts.append(f"{record.seconds:.0f} s of training at {record.images_per_s:.0f} images/s")
    return ", ".join(parts)
