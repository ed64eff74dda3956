"""One training run, from a recipe to a folder of results."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from timm_xformers.data.digest import changes, describe, digest_of
from timm_xformers.data.loader import killed_worker
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import previous_of, recover, sweep
from timm_xformers.recipe import NO_INFLUENCE, Recipe
from timm_xformers.records.curves import plot_curves
from timm_xformers.records.results_csv import EpochRow, write_history
from timm_xformers.records.results_json import (
    Record,
    environment,
    highest,
    reset_peak_memory,
    split_fields,
)
from timm_xformers.records.run_folder import RunFolder, create_run_folder, hold, open_run_folder
from timm_xformers.training.build import build_model
from timm_xformers.training.checkpoint import (
    Checkpoint,
    ModelInfo,
    Progression,
    open_last,
    save_best,
    save_last,
)
from timm_xformers.training.devices import emulation_note
from timm_xformers.training.loop import EpochStats, EpochSums, Trainer
from timm_xformers.training.metrics import AnyMetrics, evaluate_model, write_classes
from timm_xformers.training.run_log import RunLog, epoch_line, headline, summary
from timm_xformers.training.session import Session, open_session
from timm_xformers.training.sharding import gather_shards, place, whole_weights
from timm_xformers.training.signals import Stopped, StopRequest
from timm_xformers.training.trackers import Trackers, tracker_names

__all__ = ["resume", "train"]

NO_BEST: dict[str, Any] = {"best_epoch": 0, "best_score": -1, "best_loss": math.inf}
# How often several processes ask each other whether to save or stop.
UPDATES_BETWEEN_QUESTIONS = 8


def train(recipe: Recipe, notes: Sequence[str] = ()) -> tuple[RunFolder, Record]:
    """Train from the start, with notes to be said after the headline.

    Raises:
        UserError: Something the user can repair. What finished epochs left behind is kept.
    """
    tracker_names(recipe)  # refuses what is missing before any work
    session = open_session(recipe)
    folder = create_run_folder(recipe, session.accelerator)
    with hold(folder, session.accelerator):
        if session.accelerator.is_main_process:
            recipe.save(folder.recipe)
        return folder, _start(session, folder, notes)


def resume(root: Path, **settings: Any) -> tuple[RunFolder, Record]:
    """Go on where the last checkpoint stands, to the result of the undisturbed run.

    Args:
        root: A run folder.
        settings: Fields that do not shape the result: ``data_dir``, ``num_workers``.

    Raises:
        UserError: There is nothing to go on with, the data or the recipe changed, another process
            is training there, or something else the user can repair.
    """
    folder, recipe = open_run_folder(root)
    tracker_names(recipe)
    session = open_session(dataclasses.replace(recipe, **settings))
    with hold(folder, session.accelerator):
        if folder.record.exists():
            open_run_folder(root)  # finished meanwhile, which it says
        if session.accelerator.is_main_process:
            sweep(folder.root)
        session.accelerator.wait_for_everyone()
        if not (folder.last.exists() or previous_of(folder.last).exists()):
            notes = ["There is no checkpoint yet; starting at the beginning."]
            return folder, _start(session, folder, notes)
        return folder, _go_on(session, folder)


def _start(session: Session, folder: RunFolder, notes: Sequence[str]) -> Record:
    processes, aligning = session.accelerator.num_processes, session.trainer.aligning
    run = _Run(session, folder, Progression(processes, aligning=aligning), [])
    # Before the first epoch, so that a full disk or a missing right costs no training.
    run.save()
    return run.execute(notes)


def _go_on(session: Session, folder: RunFolder) -> Record:
    checkpoint = open_last(folder.last)
    _refuse_changes(checkpoint.origin, _origin(session), folder)
    _restore(session, checkpoint, folder.root)
    progression, notes = checkpoint.progression, [f"Going on {checkpoint.progression.place}."]
    if checkpoint.damaged:
        notes.insert(0, f"Damaged, hence not used: {checkpoint.damaged}.")
    damage = _recover_best(session, folder, progression)  # all processes have read by now
    if checkpoint.damaged and session.accelerator.is_main_process:
        # Or the next save would keep it as the older one.
        shutil.rmtree(folder.last, ignore_errors=True)
    if damage:
        notes.append(f"{folder.best} is damaged ({damage}); a later epoch will replace it.")
        progression = dataclasses.replace(progression, **NO_BEST)
    return _Run(session, folder, progression, checkpoint.rows).execute(notes)


def _origin(session: Session) -> dict[str, Any]:
    """What a run is bound to: its recipe and its data."""
    # Through JSON, as it comes back from a file.
    recipe: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(session.recipe)))
    shaping = {
        name: value for name, value in recipe.items() if name == "seed" or name not in NO_INFLUENCE
    }
    teacher = session.trainer.teacher
    bound = {"recipe": shaping, "data": describe(session.data)}
    return bound if teacher is None else bound | {"teacher": teacher.name}


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    """A run goes on with the recipe and the data that it began with, or not at all."""
    if not before:  # written by an earlier version
        return
    # Settings that came with a newer version are as they are.
    changed = [
        f"{name} is {now['recipe'].get(name)!r} and was {value!r}"
        for name, value in before["recipe"].items()
        if now["recipe"].get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder.recipe} is not what the run began with: {'; '.join(changed)}. Restore it, or "
            "start a new run."
        )
    if before.get("teacher") != now.get("teacher"):
        raise UserError(
            f"The teacher is {now.get('teacher')}, and the run in {folder.root} began with "
            f"{before.get('teacher')}; restore its weights, or start a new run."
        )
    if difference := changes(before["data"], now["data"]):
        raise UserError(
            f"The data is not what the run in {folder.root} began with: {difference}. Restore it, "
            "or name its folder by --data-dir, or start a new run; one from these weights: "
            f"timm-xformers train --model {folder.root}."
        )


@dataclasses.dataclass
class _Run:
    """A session on its way through the epochs.

    Attributes:
        session: What it works with.
        folder: What it writes to.
        progression: Where ``last/`` stands.
        rows: One for each finished epoch.
        saved_at: When ``last/`` was written.
    """

    session: Session
    folder: RunFolder
    progression: Progression
    rows: list[EpochRow]
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # Now, so that an image that cannot be decoded stops the run before it begins.
        for name in ("train", "val", "test"):
            self.session.opened(name)
        self.origin = _origin(self.session)
        # An epoch that is not finished has its own.
        self.session.trainer.cpu_seconds = sum(row.cpu_seconds or 0.0 for row in self.rows)
        if self.progression.sums:
            rank = self.session.accelerator.process_index
            self.session.trainer.cpu_seconds += self.progression.sums[rank].cpu_seconds

    def execute(self, notes: Sequence[str] = ()) -> Record:
        """Say the notes, train what is left, then measure the best weights.

        Raises:
            Stopped: A signal came; the state is saved.
        """
        session, folder = self.session, self.folder
        recipe, accelerator = session.recipe, session.accelerator
        done_steps = self.progression.sums[0].passes if self.progression.sums else 0
        reset_peak_memory(accelerator.device)
        total_steps = session.steps_through(recipe.epochs)
        if recipe.max_steps:
            total_steps = min(total_steps, recipe.max_steps * recipe.grad_accum_steps)
        log = RunLog(
            folder.log,
            total_steps=total_steps,
            done_steps=session.steps_through(self.progression.epoch) + done_steps,
            speaking=accelerator.is_main_process,
            done_share=session.trainer.spent_share,
        )
        with (
            StopRequest() as request,
            log,
            Trackers(
                tracker_names(recipe),
                accelerator,
                recipe,
                folder.root,
                done_epochs=self.progression.epoch,
                say=log.say,
            ) as trackers,
        ):
            warning = emulation_note(recipe.mixed_precision, accelerator.device)
            replaced = session.replaced.splitlines() if self.progression.epoch == 0 else []
            for line in (headline(session, folder.root), *replaced, *notes, warning):
                if line is not None:
                    log.say(line)
            for note in session.data.notes:
                log.say(note)
            for name in session.data.skipped:
                log.say(f"left out, cannot be read: {name}")
            try:
                for epoch in range(self.progression.epoch + 1, recipe.epochs + 1):
                    if session.trainer.spent:
                        break
                    reached, row = self._epoch(epoch, log, request)
                    self.rows.append(row)
                    if accelerator.is_main_process:
                        write_history(folder.history, self.rows)
                        trackers.log_epoch(row)
                    self.save(reached)
                    left = log.remaining(session.steps_through(epoch), session.trainer.spent_share)
                    log.say(epoch_line(row, recipe, left))
                    self._leave_if_asked(request.signum if epoch < recipe.epochs else 0)
                if recipe.epochs == 0:
                    self._keep()
            except (KeyboardInterrupt, Stopped):
                log.say(
                    f"Stopped. {folder.last} holds the state {self.progression.place}; go on with: "
                    f"timm-xformers train --resume {folder.root}"
                )
                raise
            except RuntimeError as error:
                raise killed_worker(error) or error from None
            record = self._measure()
            if accelerator.is_main_process:
                if self.rows:
                    plot_curves(folder.curves, self.rows, record)
                record.save(folder.record)
                trackers.log_record(record)
                shutil.rmtree(previous_of(folder.last), ignore_errors=True)
            log.say(summary(record))
        accelerator.end_training()
        return record

    def _epoch(self, epoch: int, log: RunLog, request: StopRequest) -> tuple[Progression, EpochRow]:
        session, trainer = self.session, self.session.trainer
        if session.enter(epoch):
            # Only weights of the last size are of use.
            self.progression = dataclasses.replace(self.progression, **NO_BEST)
        before = session.steps_through(epoch - 1)
        label = f"epoch {epoch}/{session.recipe.epochs}"
        rank, sums = session.accelerator.process_index, self.progression.sums
        stats, metrics = session.run_epoch(
            epoch,
            on_progress=lambda done, *figures: log.at(before + done, label, *figures),
            on_update=lambda so_far: self._between_updates(so_far, request),
            sums=dataclasses.replace(sums[rank]) if sums else None,
        )
        reached = dataclasses.replace(self.progression, epoch=epoch, sums=(), **self._where())
        if metrics is None or _better(metrics, reached):
            reached = dataclasses.replace(
                reached,
                best_epoch=epoch,
                best_score=metrics.score if metrics else 0,
                best_loss=metrics.loss if metrics else math.inf,
            )
            self._keep()
        return reached, _row(epoch, stats, metrics, trainer)

    def _between_updates(self, so_far: Callable[[], EpochSums], request: StopRequest) -> None:
        """Save within an epoch, if it is time or a signal came.

        All processes must come to the same answer, and asking each other costs time, so several
        of them ask only now and then.
        """
        session, trainer = self.session, self.session.trainer
        accelerator = session.accelerator
        minutes = session.recipe.checkpoint_minutes
        due = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        signum = request.signum
        if accelerator.num_processes > 1:
            if trainer.updates % UPDATES_BETWEEN_QUESTIONS:
                return
            wishes = torch.tensor([[int(due), signum]], device=accelerator.device)
            due, signum = accelerator.gather(wishes).amax(dim=0).tolist()
        if due or signum:
            everyones = gather_object([dataclasses.astuple(so_far())])
            sums = tuple(EpochSums(*values) for values in everyones)
            self.save(dataclasses.replace(self.progression, sums=sums, **self._where()))
        if signum:
            raise Stopped(f"Stopped by signal {signum}.", signum)

    def _keep(self) -> None:
        """Write ``best/`` from the weights as they are."""
        weights = self.session.trainer.best_weights
        with whole_weights(weights):
            if self.session.accelerator.is_main_process:
                save_best(self.folder.best, weights, _info(self.session))

    def _where(self) -> dict[str, Any]:
        trainer = self.session.trainer
        return {"updates": trainer.updates, "aligning": trainer.aligning}

    def _leave_if_asked(self, signum: int) -> None:
        """Stop between epochs, if a signal came to any process."""
        accelerator = self.session.accelerator
        signums = accelerator.gather(torch.tensor([signum], device=accelerator.device))
        if signums.max():
            raise Stopped(f"Stopped by signal {int(signums.max())}.", int(signums.max()))

    def save(self, reached: Progression | None = None) -> None:
        """Write ``last/``, which then stands where the run is."""
        trainer, accelerator = self.session.trainer, self.session.accelerator
        reached = reached or self.progression
        scaler = accelerator.scaler
        state = gather_shards(
            {
                "optimizer": trainer.optimizer.state_dict(),
                "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
        )
        with whole_weights(trainer.model):
            if accelerator.is_main_process:
                last, info = self.folder.last, _info(self.session)
                save_last(last, trainer.model, info, state, reached, self.rows, self.origin)
        accelerator.wait_for_everyone()
        self.progression = reached
        self.saved_at = time.monotonic()

    def _measure(self) -> Record:
        """Validate and test the weights as they lie in ``best/``; the only look at the test set."""
        session, recipe = self.session, self.session.recipe
        accelerator = session.accelerator
        model, _ = build_model(f"local-dir:{self.folder.best}", pretrained=True)
        place(accelerator, model)
        teacher = session.trainer.teacher
        measured: dict[str, Any] = {}
        described: tuple[AnyMetrics, str] | None = None  # the test set comes last, and goes first
        for name in ("val", "test"):
            if (batches := session.opened(name)) is not None:
                metrics = evaluate_model(
                    model,
                    batches,
                    recipe.batch_size,
                    accelerator,
                    None if teacher is None else teacher.model,
                )
                measured |= split_fields(name, metrics)
                described = (metrics, name)
        if described is not None and accelerator.is_main_process:
            self._write_classes(*described)
        seconds = sum(row.train_seconds for row in self.rows)
        waited = sum(row.wait_seconds for row in self.rows)
        return Record(
            kind="train",
            model=session.model_name,
            model_kwargs=session.model_kwargs,
            params=session.num_params,
            data=recipe.data,
            **session.preprocessing.size_fields,
            num_classes=session.data.num_classes,
            skipped_images=len(session.data.skipped),
            data_notes=session.data.kept_notes,
            initial_weights=session.initial_weights,
            teacher=None if teacher is None else teacher.name,
            data_digest=digest_of(self.origin["data"]),
            epochs=len(self.rows),
            best_epoch=self.progression.best_epoch,
            recipe_hash=recipe.digest,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            num_processes=accelerator.num_processes,
            mixed_precision=recipe.mixed_precision,
            cpu_seconds=round(session.trainer.cpu_seconds, 2),
            seconds=round(seconds, 2),
            images_per_s=round(sum(row.train_images for row in self.rows) / seconds, 1)
            if self.rows
            else 0.0,
            data_wait_percent=round(100 * waited / seconds, 2) if self.rows else None,
            step_ms=highest(accelerator, round(1000 * seconds / session.trainer.updates, 2))
            if self.rows
            else None,
            **measured,
            **environment(accelerator),
        )

    def _write_classes(self, metrics: AnyMetrics, split: str) -> None:
        percent = metrics.percents[metrics.headline.key]
        title = f"{self.session.model_name} on {self.session.recipe.data}, {split}: {percent:.2f} %"
        write_classes(self.folder, metrics, self.session.data.class_names, title)


def _restore(session: Session, checkpoint: Checkpoint, root: Path) -> None:
    """Put a session where a checkpoint stands."""
    trainer, accelerator = session.trainer, session.accelerator
    progression = checkpoint.progression
    running = progression.epoch + (1 if progression.sums else 0)
    session.enter(running)  # the size that the weights have
    if session.trainer.aligning and not progression.aligning:  # a budget ended that part sooner
        session.end_alignment()
    if progression.num_processes != accelerator.num_processes:
        raise UserError(
            f"{root} was started with {progression.num_processes} processes, and these are "
            f"{accelerator.num_processes}; go on with as many."
        )
    state = checkpoint.load(trainer.model)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(state["ema"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    trainer.updates = progression.updates
    passes = progression.sums[0].passes if progression.sums else 0
    epoch = progression.epoch + 1
    trainer.step_schedule(epoch, passes, session.steps_in(epoch))


def _recover_best(session: Session, folder: RunFolder, progression: Progression) -> str | None:
    """Look after ``best/``; what is wrong with it, told to all processes."""
    answer: list[str | None] = [None]
    if session.accelerator.is_main_process and progression.best_epoch:
        answer = [recover(folder.best)]
    broadcast_object_list(answer)
    return answer[0]


def _info(session: Session) -> ModelInfo:
    data = session.data
    return ModelInfo(session.model_args, session.preprocessing, data.class_names, data.multi_label)


def _better(metrics: AnyMetrics, progression: Progression) -> bool:
    """The higher score; among equals, the lower loss."""
    before = (progression.best_score, -progression.best_loss)
    return (metrics.score, -metrics.loss) > before


def _row(epoch: int, stats: EpochStats, metrics: AnyMetrics | None, trainer: Trainer) -> EpochRow:
    percents: dict[str, Any] = {"top1": None, "top5": None} | (metrics.percents if metrics else {})
    return EpochRow(
        epoch=epoch,
        lr=max(float(group["lr"]) for group in trainer.optimizer.param_groups),
        train_loss=stats.loss,
        train_top1_percent=None if trainer.unlabelled else stats.right_percent,
        train_agreement_percent=stats.right_percent if trainer.unlabelled else None,
        val_loss=metrics.loss if metrics else None,
        train_seconds=stats.seconds,
        train_images=stats.images,
        wait_seconds=stats.wait_seconds,
        cpu_seconds=stats.cpu_seconds,
        **{f"val_{name}_percent": percent for name, percent in percents.items()},
    )
