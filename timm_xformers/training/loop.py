"""One epoch of training, on any number of processes."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_xformers.data.data import Batches
from timm_xformers.data.sampling import (
    derive_seed,
    seed_everything,
    train_batches,
)
from timm_xformers.errors import DivergedError, UsageError
from timm_xformers.training.metrics import add_up
from timm_xformers.training.optim import Mix
from timm_xformers.training.teacher import Teacher

__all__ = ["EpochStats", "EpochSums", "Trainer"]

# How often the running loss leaves the device: reading it waits for everything before it.
REPORT_SECONDS = 0.5


@dataclass
class EpochSums:
    """What one process adds up over an epoch, so that an epoch can be continued.

    Attributes:
        loss: Training losses of its micro-batches.
        right: Right answers.
        passes: Micro-batches.
        images: Images.
        seconds: Wall time.
        wait_seconds: Part of it spent waiting for batches.
        cpu_seconds: Processor time of all threads of the process.
    """

    loss: float = 0.0
    right: int = 0
    passes: int = 0
    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class EpochStats:
    """Figures of one training epoch, over all processes.

    Attributes:
        loss: Mean of the training loss.
        right_percent: Right answers on the augmented images, before each update; of two mixed
            images, the heavier one counts. Where there are no labels, the teacher's answer is
            right. None where layers alone were trained, or images have several classes.
        seconds: Like those below, as in `EpochSums`.
    """

    loss: float
    right_percent: float | None
    seconds: float
    wait_seconds: float
    images: int
    cpu_seconds: float


@dataclass
class Trainer:
    """What changes while training, and how one epoch changes it.

    Attributes:
        model: The plain model.
        wrapped: The same, as accelerate prepared it.
        optimizer: As accelerate prepared it.
        scheduler: Learning rate by number of updates, if it is to change.
        criterion: Training loss.
        mixup: Mixes a batch's images and labels, if wanted.
        ema: Averaged weights, if wanted.
        clip_grad: Like all that have names of settings, as in the recipe.
        batch_size: Images of a micro-batch, per process, at the present stage.
        updates_per_epoch: Unit of the schedule: updates of an epoch of the last stage.
        total_epochs: Epochs of the run, unless a budget ends it sooner.
        teacher: What is learned from, besides or instead of labels.
        updates: Updates so far.
        cpu_seconds: Processor seconds of training so far.
    """

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    criterion: nn.Module
    mixup: Mix | None
    ema: ModelEmaV3 | None
    clip_grad: float
    grad_accum_steps: int
    batch_size: int
    updates_per_epoch: int
    channels_last: bool
    seed: int
    total_epochs: int
    max_steps: int | None = None
    max_seconds: float | None = None
    teacher: Teacher | None = None
    align_epochs: int = 0
    multi_label: bool = False
    unlabelled: bool = False
    updates: int = 0
    cpu_seconds: float = 0.0

    def train_epoch(
        self,
        data: Batches,
        epoch: int,
        on_progress: Callable[[int, float, float | None, float], None] | None = None,
        on_update: Callable[[Callable[[], EpochSums]], None] | None = None,
        sums: EpochSums | None = None,
    ) -> EpochStats:
        """Train on the batches of one epoch that are left.

        Args:
            data: Training images.
            epoch: Number of the epoch; decides the order.
            on_progress: Told now and then: batches done, mean loss, right answers in percent (as
                in `EpochStats`) and images per second of the epoch so far.
            on_update: Called after every update but the last, with a function that gives the sums
                so far. That is where an epoch can be left and continued.
            sums: Of the batches that are done.

        Raises:
            DivergedError: The loss is NaN or infinite.
        """
        accelerator, sums = self.accelerator, sums or EpochSums()
        rank, world_size = accelerator.process_index, accelerator.num_processes
        order = train_batches(
            len(data),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )
        compiled = hasattr(self.wrapped, "_orig_mod")
        watch = _LossWatch(epoch, len(order), sums, compiled=compiled)
        first = sums.passes
        self.wrapped.train()
        start = reported = time.perf_counter() - sums.seconds
        cpu_start = time.process_time() - sums.cpu_seconds
        cpu_before = self.cpu_seconds - sums.cpu_seconds
        stream = iter(data.batches(order[first:], epoch))

        def sums_so_far() -> EpochSums:
            watch.read()
            sums.seconds = time.perf_counter() - start
            sums.cpu_seconds = time.process_time() - cpu_start
            return sums

        for number in range(first, len(order)):
            before = time.perf_counter()
            images, labels = next(stream)
            sums.wait_seconds += time.perf_counter() - before
            seed_everything(derive_seed(self.seed, "step", epoch, number, rank))
            # The last group of an epoch may be smaller than the others.
            group = number // self.grad_accum_steps * self.grad_accum_steps
            group_size = min(self.grad_accum_steps, len(order) - group)
            loss, logits, targets = self._step(images, labels, number - group, group_size)
            self.cpu_seconds = cpu_before + time.process_time() - cpu_start
            if number - group == group_size - 1:
                self.step_schedule(epoch, number + 1, len(order))
            watch.add(loss, logits if self.counting else None, targets)
            now = time.perf_counter()
            if on_progress and now - reported > REPORT_SECONDS:
                reported = now
                mean_loss, right_percent = watch.read()
                speed = sums.images * world_size / (now - start)
                on_progress(number + 1, mean_loss, right_percent if self.counting else None, speed)
            if number - group == group_size - 1 and (self.spent or self.is_aligned(epoch)):
                break
            if on_update and (number + 1) % self.grad_accum_steps == 0 and number + 1 < len(order):
                on_update(sums_so_far)
        own = dataclasses.astuple(sums_so_far())
        loss, right, passes, images_seen = add_up(
            accelerator, torch.tensor(own[:4], dtype=torch.float64)
        ).tolist()
        return EpochStats(
            loss=loss / passes,
            right_percent=100 * right / images_seen if self.counting else None,
            seconds=sums.seconds,
            wait_seconds=sums.wait_seconds,
            images=int(images_seen),
            cpu_seconds=sums.cpu_seconds,
        )

    @property
    def spent(self) -> bool:
        """Whether a budget of updates or processor seconds has ended the run."""
        return self.spent_share >= 1

    @property
    def spent_share(self) -> float:
        """Share of the budget that is used; 0 without one."""
        if self.max_steps:
            return self.updates / self.max_steps
        return self.cpu_seconds / self.max_seconds if self.max_seconds else 0.0

    @property
    def aligning(self) -> bool:
        """Whether single layers are trained to match a teacher's."""
        return self.teacher is not None and self.teacher.aligning

    @property
    def counting(self) -> bool:
        """Whether answers can be right: whole models give them, for one class an image."""
        return not (self.aligning or self.multi_label)

    def is_aligned(self, epoch: int) -> bool:
        """Whether the part of the run that aligns layers is over at some point of an epoch."""
        if not self.aligning:
            return False
        share = self.align_epochs / self.total_epochs
        return epoch > self.align_epochs or self.spent_share >= share

    def step_schedule(self, epoch: int, passes: int, num_batches: int) -> None:
        """Set the learning rate to what follows some passes of an epoch's ``num_batches``."""
        if self.scheduler is None:
            return
        done, all_ = (math.ceil(n / self.grad_accum_steps) for n in (passes, num_batches))
        unit = self.updates_per_epoch
        # Epochs of other stages have more or fewer updates, and count as one unit all the same.
        within: Any = done if all_ == unit else done * unit / all_
        by_epochs: Any = (epoch - 1) * unit + within
        # Under a budget, the schedule ends with whatever ends first.
        whole = self.total_epochs * unit
        by_budget = min(self.spent_share, 1.0) * whole
        point = max(by_epochs, by_budget) if by_budget else by_epochs
        if border := self.align_epochs * unit:  # each part has the whole schedule
            aligned = min(point, border) * whole / border
            rest = max(point - border, 0) * whole / max(whole - border, 1)
            point = aligned if self.aligning else rest
        self.scheduler.step_update(point)

    def _step(
        self, images: Tensor, labels: Tensor, place: int, group_size: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Forward and backward; after the last micro-batch of a group, one update.

        Returns:
            Loss, logits (B, classes), which there are none of while layers are aligned, and
            targets: labels (B,), or marks or what mixup made of either, (B, classes).
        """
        accelerator = self.accelerator
        if self.unlabelled:  # what is mixed must be a class, and is not read
            labels = torch.zeros_like(labels)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        last = place == group_size - 1
        # Only the last micro-batch of a group needs the other processes' gradients.
        sync = contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped)
        with sync:
            # Accelerate gives it to the forward pass of unsharded models only.
            try:
                loss, logits = self._loss(images, targets)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    "Batch normalisation cannot train on one value per channel, which a batch of "
                    f"{len(images)} gives this model; use batch_size=2 or more."
                ) from error
            accelerator.backward(loss / group_size)
        if last:
            if self.clip_grad:
                accelerator.clip_grad_norm_(self.wrapped.parameters(), self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.model, step=self.updates)
        if self.unlabelled and self.teacher is not None and not self.aligning:
            targets = self.teacher.answers
        return loss.detach(), None if logits is None else logits.detach(), targets

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.teacher is not None:
            return self.teacher.loss(
                self.wrapped, images, targets, self.criterion, self.accelerator
            )
        with self.accelerator.autocast():
            logits = self.wrapped(images)
        return self.criterion(logits.float(), targets), logits

    @property
    def best_weights(self) -> nn.Module:
        """The model to evaluate and keep: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.module


class _LossWatch:
    """Collects losses and right answers on the device and reads them now and then."""

    def __init__(
        self, epoch: int, num_batches: int, sums: EpochSums, *, compiled: bool = False
    ) -> None:
        self.epoch = epoch
        self.num_batches = num_batches
        self.pending: list[Tensor] = []
        self.sums = sums
        self.advice = "lower lr or set clip_grad=1"
        if compiled:  # kernels can be wrong too
            self.advice += ", or see whether it comes without compile=true"

    def add(self, loss: Tensor, logits: Tensor | None, targets: Tensor) -> None:
        # Of two mixed images, the heavier one counts.
        labels = targets.argmax(dim=-1) if targets.dim() == 2 else targets
        right = 0 * loss if logits is None else (logits.argmax(dim=-1) == labels).sum()
        self.pending.append(torch.stack([loss.float(), right.float()]))
        self.sums.images += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent so far; fails at the first NaN or infinite loss."""
        sums = self.sums
        if self.pending:
            rows = torch.stack(self.pending).cpu().tolist()  # (micro-batches, 2)
            self.pending.clear()
            # One by one: a sum must not depend on how often it was read.
            for loss, right in rows:
                sums.passes += 1
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"The loss became {loss} in epoch {self.epoch}, step {sums.passes} of "
                        f"{self.num_batches}; {self.advice}. The best weights so far are kept."
                    )
                sums.loss += loss
                sums.right += int(right)
        return sums.loss / sums.passes, 100 * sums.right / sums.images
