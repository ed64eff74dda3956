"""One training run, from a recipe to a folder of results."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from timm_xformers.training.build import build_model
from timm_xformers.training.checkpoint import Progression, load_last, save_best, save_last
from timm_xformers.training.curves import plot_curves
from timm_xformers.training.data import Batches
from timm_xformers.training.errors import UserError
from timm_xformers.training.folder import RunFolder, create_run_folder, open_run_folder
from timm_xformers.training.history import EpochRow, read_history, write_history
from timm_xformers.training.loop import EpochStats
from timm_xformers.training.metrics import Metrics, evaluate_model
from timm_xformers.training.preprocessing import Preprocessing
from timm_xformers.training.progress import Progress, epoch_line, headline, summary
from timm_xformers.training.recipe import Recipe
from timm_xformers.training.results import Record, environment, split_fields
from timm_xformers.training.session import Session, open_session

__all__ = ["resume", "train"]


def train(recipe: Recipe) -> tuple[RunFolder, Record]:
    """Train from the start.

    Raises:
        UserError: Something the user can repair. What finished epochs left behind is kept.
    """
    session = open_session(recipe)
    folder = create_run_folder(recipe, session.accelerator)
    if session.accelerator.is_main_process:
        recipe.save(folder.recipe)
    run = _Run(session, folder, Progression(num_processes=session.accelerator.num_processes), [])
    # Before the first epoch, so that a full disk or a missing right costs no training.
    run.save()
    return folder, run.execute()


def resume(root: Path, **changes: Any) -> tuple[RunFolder, Record]:
    """Go on after the last finished epoch, to the result of the undisturbed run.

    Args:
        root: A run folder.
        changes: Fields that do not shape the result: ``data_dir``, ``num_workers``.

    Raises:
        UserError: There is nothing to go on with, or something the user can repair.
    """
    folder, recipe = open_run_folder(root)
    session = open_session(dataclasses.replace(recipe, **changes))
    progression = _restore(session, folder)
    rows = read_history(folder.history)[: progression.epoch]
    return folder, _Run(session, folder, progression, rows).execute()


@dataclasses.dataclass
class _Run:
    """A session on its way through the epochs.

    Attributes:
        session: What it works with.
        folder: What it writes to.
        progression: Where ``last/`` stands.
        rows: One for each finished epoch.
        train_data: Augmented training images.
        val_data: Validation images, if there are any.
        test_data: Test images, if there are any: decoded now, so that one that cannot be read stops
            the run before it begins, and measured once, at the end.
    """

    session: Session
    folder: RunFolder
    progression: Progression
    rows: list[EpochRow]
    train_data: Batches = dataclasses.field(init=False)
    val_data: Batches | None = dataclasses.field(init=False)
    test_data: Batches | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        session, val, test = self.session, self.session.data.val, self.session.data.test
        self.train_data = session.batches(session.data.train, training=True)
        self.val_data = None if val is None else session.batches(val)
        self.test_data = None if test is None else session.batches(test)

    def execute(self) -> Record:
        """Train the epochs that are left, then measure the best weights."""
        session, folder = self.session, self.folder
        recipe, accelerator = session.recipe, session.accelerator
        with Progress(
            folder.log,
            total_steps=session.steps * recipe.epochs,
            done_steps=session.steps * self.progression.epoch,
            speaking=accelerator.is_main_process,
        ) as progress:
            progress.say(headline(session, folder.root))
            for name in session.data.skipped:
                progress.say(f"left out, cannot be read: {name}")
            try:
                for epoch in range(self.progression.epoch + 1, recipe.epochs + 1):
                    reached, row = self._epoch(epoch, progress)
                    self.rows.append(row)
                    if accelerator.is_main_process:
                        write_history(folder.history, self.rows)
                    self.save(reached)
                    left = progress.remaining(session.steps * epoch)
                    progress.say(epoch_line(row, recipe.epochs, left))
            except KeyboardInterrupt:
                progress.say(
                    f"Stopped. {folder.last} holds the state after epoch "
                    f"{self.progression.epoch}; go on with: timm-xformers train --resume "
                    f"{folder.root}"
                )
                raise
            record = self._measure()
            if accelerator.is_main_process:
                plot_curves(folder.curves, self.rows, record)
                record.save(folder.record)
            progress.say(summary(record))
        accelerator.end_training()
        return record

    def _epoch(self, epoch: int, progress: Progress) -> tuple[Progression, EpochRow]:
        session, trainer = self.session, self.session.trainer
        before = session.steps * (epoch - 1)
        label = f"epoch {epoch}/{session.recipe.epochs}"
        stats = trainer.train_epoch(
            self.train_data,
            epoch,
            lambda done, *figures: progress.at(before + done, label, *figures),
        )
        metrics = None
        if self.val_data is not None:
            metrics = evaluate_model(
                trainer.best_weights,
                self.val_data,
                session.recipe.batch_size,
                session.accelerator,
            )
            if not math.isfinite(metrics.loss):
                raise UserError(
                    f"The validation loss became {metrics.loss} after epoch {epoch}; lower lr or "
                    "set clip_grad=1. The best weights so far are kept."
                )
        reached = dataclasses.replace(self.progression, epoch=epoch, updates=trainer.updates)
        if metrics is None or _better(metrics, reached):
            reached = dataclasses.replace(
                reached,
                best_epoch=epoch,
                best_top1=metrics.top1 if metrics else 0,
                best_loss=metrics.loss if metrics else math.inf,
            )
            if session.accelerator.is_main_process:
                save_best(self.folder.best, trainer.best_weights, *_description(session))
        return reached, _row(epoch, stats, metrics, trainer.optimizer.param_groups)

    def save(self, reached: Progression | None = None) -> None:
        """Write ``last/``, which then stands where the run is."""
        trainer, accelerator = self.session.trainer, self.session.accelerator
        reached = reached or self.progression
        if accelerator.is_main_process:
            scaler = accelerator.scaler
            state = {
                "optimizer": trainer.optimizer.state_dict(),
                "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_last(self.folder.last, trainer.model, *_description(self.session), state, reached)
        accelerator.wait_for_everyone()
        self.progression = reached

    def _measure(self) -> Record:
        """Validate and test the weights as they lie in ``best/``; the only look at the test set."""
        session, recipe = self.session, self.session.recipe
        accelerator = session.accelerator
        model, _ = build_model(f"local-dir:{self.folder.best}", pretrained=True)
        model.to(accelerator.device)
        measured: dict[str, Any] = {}
        for name, batches in (("val", self.val_data), ("test", self.test_data)):
            if batches is not None:
                metrics = evaluate_model(model, batches, recipe.batch_size, accelerator)
                measured |= split_fields(name, metrics)
        seconds = sum(row.train_seconds for row in self.rows)
        waited = sum(row.wait_seconds for row in self.rows)
        return Record(
            kind="train",
            model=recipe.model,
            model_kwargs=recipe.model_kwargs,
            params=session.num_params,
            data=recipe.data,
            img_size=session.preprocessing.img_size,
            in_chans=session.preprocessing.in_chans,
            num_classes=session.data.num_classes,
            skipped_images=len(session.data.skipped),
            epochs=recipe.epochs,
            best_epoch=self.progression.best_epoch,
            recipe_hash=recipe.digest,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            num_processes=accelerator.num_processes,
            mixed_precision=recipe.mixed_precision,
            seconds=round(seconds, 2),
            images_per_s=round(sum(row.train_images for row in self.rows) / seconds, 1),
            data_wait_percent=round(100 * waited / seconds, 2),
            **measured,
            **environment(accelerator.device),
        )


def _restore(session: Session, folder: RunFolder) -> Progression:
    """Put a session where ``last/`` stands."""
    trainer, accelerator = session.trainer, session.accelerator
    state, progression = load_last(folder.last, trainer.model)
    if progression.num_processes != accelerator.num_processes:
        raise UserError(
            f"{folder.root} was started with {progression.num_processes} processes, and these "
            f"are {accelerator.num_processes}; go on with as many."
        )
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(state["ema"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    trainer.updates = progression.updates
    if trainer.scheduler is not None:
        trainer.scheduler.step_update(trainer.updates)
    return progression


def _description(session: Session) -> tuple[dict[str, Any], Preprocessing, tuple[str, ...]]:
    return session.model_args, session.preprocessing, session.data.class_names


def _better(metrics: Metrics, progression: Progression) -> bool:
    """More right answers; among equals, the lower loss."""
    before = (progression.best_top1, -progression.best_loss)
    return (metrics.top1, -metrics.loss) > before


def _row(
    epoch: int, stats: EpochStats, metrics: Metrics | None, groups: list[dict[str, Any]]
) -> EpochRow:
    return EpochRow(
        epoch=epoch,
        lr=max(float(group["lr"]) for group in groups),
        train_loss=stats.loss,
        train_top1_percent=stats.top1_percent,
        val_loss=metrics.loss if metrics else None,
        val_top1_percent=metrics.top1_percent if metrics else None,
        val_top5_percent=metrics.top5_percent if metrics else None,
        train_seconds=stats.seconds,
        train_images=stats.images,
        wait_seconds=stats.wait_seconds,
    )
