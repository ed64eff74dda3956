"""Figures for TensorBoard and its like, sent through accelerate; a tracker never ends a run."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_xformers.errors import UserError, require_extra
from timm_xformers.files.text import one_line
from timm_xformers.recipe import Recipe
from timm_xformers.records.headline import headline_of
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.records.results_json import Record

__all__ = ["Trackers", "tracker_names"]

PROJECT = "timm-xformers"
# Where things lie on this machine is nobody else's business, and means nothing elsewhere.
NOT_SENT = ("output", "data_dir", "trackers")


def tracker_names(recipe: Recipe) -> list[str]:
    """Trackers that a recipe asks for, TensorBoard if it asks for none and has it.

    Raises:
        UserError: One asked for by name is not installed.
    """
    if recipe.trackers is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if "tensorboard" in recipe.trackers:
        require_extra("train", "tensorboard")
    for name in recipe.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers={recipe.trackers} needs {name}, not installed here; run: pip install "
                f"{name}, or drop it from trackers."
            )
    return list(dict.fromkeys(recipe.trackers))


class Trackers:
    """What the trackers of one run are told, from the main process.

    Whatever goes wrong in a tracker becomes one warning, and the run goes on without it. Recipe and
    figures are all they get: no environment variables, no paths.

    Args:
        names: As accelerate calls them.
        root: Run folder. TensorBoard's files go to ``tensorboard/`` in it.
        done_epochs: Epochs of earlier sessions; figures after them, if any, are replaced.
        say: Receives the warnings.
    """

    def __init__(
        self,
        names: list[str],
        accelerator: Accelerator,
        recipe: Recipe,
        root: Path,
        *,
        done_epochs: int,
        say: Callable[[str], None],
    ) -> None:
        self.say = say
        self.running: dict[str, Any] = {}
        if not accelerator.is_main_process:
            return
        # Hyper-parameters once: a second set would be a second run to TensorBoard.
        config = None if done_epochs else _settings(recipe)
        for name in names:
            self._guard(name, self._start, name, accelerator, root, done_epochs, config)
        # `Accelerator.end_training` would let their exceptions through; `__exit__` ends them.
        accelerator.trackers = []

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.running):
            self._guard(name, self.running[name].finish)
        self.running.clear()

    def log_epoch(self, row: EpochRow) -> None:
        """Send one epoch."""
        headline = headline_of(row)
        values = {
            "train/loss": row.train_loss,
            "train/top1_percent": row.train_top1_percent,
            "train/agreement_percent": row.train_agreement_percent,
            "train/lr": row.lr,
            "train/images_per_s": row.train_images / row.train_seconds,
            "val/loss": row.val_loss,
            f"val/{headline.key}_percent": headline.of(row, "val"),
        }
        self._log(values, row.epoch)

    def log_record(self, record: Record) -> None:
        """Send the numbers of the final record; its words are settings, or in results.json."""
        values: dict[str, Any] = {}
        for name, value in dataclasses.asdict(record).items():
            if name.endswith("_interval_percent") and value is not None:
                low, high = value
                values |= {f"result/{name}_low": low, f"result/{name}_high": high}
            elif isinstance(value, (int, float)):
                values[f"result/{name}"] = value
        self._log(values, record.epochs)

    def _log(self, values: dict[str, Any], step: int | None) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        # As `Accelerator.log` does, except that one tracker's failure is not the others'.
        for name in list(self.running):
            self._guard(name, self.running[name].log, known, step=step)

    def _start(
        self,
        name: str,
        accelerator: Accelerator,
        root: Path,
        done_epochs: int,
        config: dict[str, Any] | None,
    ) -> None:
        accelerator.trackers = []
        accelerator.log_with = [name]
        accelerator.project_configuration.set_directories(str(root))
        project = PROJECT
        arguments: dict[str, Any] = {}
        if name == "tensorboard":
            project = name  # accelerate makes a folder of it
            if done_epochs:  # figures of epochs that are trained again take the old ones' place
                arguments[name] = {"purge_step": done_epochs + 1}
        accelerator.init_trackers(project, config, arguments)
        (self.running[name],) = accelerator.trackers

    def _guard(self, name: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            self.running.pop(name, None)
            words = one_line(error)
            self.say(f"warning: {name} failed and gets nothing more ({words}); the run goes on.")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Recipe fields as the flat values that every tracker takes."""
    fields = dataclasses.asdict(recipe).items()
    local = [n for n in ("model", "teacher") if str(getattr(recipe, n)).startswith("local-dir:")]
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in fields
        if name not in NOT_SENT
    } | dict.fromkeys(local, "local-dir")
