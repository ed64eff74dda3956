"""One epoch of training, on any number of processes."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_xformers.training.data import Batches
from timm_xformers.training.errors import DivergedError
from timm_xformers.training.metrics import add_up
from timm_xformers.training.order import (
    derive_seed,
    num_train_batches,
    seed_everything,
    train_batches,
)

__all__ = ["EpochStats", "Trainer"]

# How often the running loss leaves the device: reading it waits for everything before it.
REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class EpochStats:
    """Figures of one training epoch, over all processes.

    Attributes:
        loss: Mean of the training loss.
        top1_percent: Right answers on the augmented images, before each update; of two mixed
            images, the heavier one counts.
        seconds: Wall time.
        wait_seconds: Part of it spent waiting for batches.
        images: Images trained on.
    """

    loss: float
    top1_percent: float
    seconds: float
    wait_seconds: float
    images: int


@dataclass
class Trainer:
    """What changes while training, and how one epoch changes it.

    Attributes:
        accelerator: Devices and processes.
        model: The plain model.
        wrapped: The same, as accelerate prepared it.
        optimizer: As accelerate prepared it.
        scheduler: Learning rate by number of updates, if it is to change.
        criterion: Training loss.
        mixup: Mixes a batch's images and labels, if wanted.
        ema: Averaged weights, if wanted.
        clip_grad: Largest norm of the gradient; 0 does not limit it.
        grad_accum_steps: Passes per update.
        batch_size: Images per process and pass.
        seed: Seed of the run.
        updates: Updates so far.
    """

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    criterion: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    clip_grad: float
    grad_accum_steps: int
    batch_size: int
    seed: int
    updates: int = 0

    def train_epoch(
        self, data: Batches, epoch: int, on_progress: Callable[[int, float, float, float], None]
    ) -> EpochStats:
        """Train on every batch of one epoch.

        Args:
            data: Training images.
            epoch: Number of the epoch; decides the order.
            on_progress: Told now and then: batches done, mean loss, accuracy in percent and images
                per second of the epoch so far.

        Raises:
            DivergedError: The loss is no longer a number.
        """
        accelerator = self.accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        order = train_batches(
            len(data),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )
        watch = _LossWatch(epoch, len(order))
        self.wrapped.train()
        start = reported = time.perf_counter()
        waited = 0.0
        stream = iter(data.batches(order, epoch))
        for number in range(len(order)):
            before = time.perf_counter()
            images, labels = next(stream)
            waited += time.perf_counter() - before
            seed_everything(derive_seed(self.seed, "step", epoch, number, rank))
            # The last group of an epoch may be smaller than the others.
            group = number // self.grad_accum_steps * self.grad_accum_steps
            group_size = min(self.grad_accum_steps, len(order) - group)
            loss, logits, targets = self._pass(images, labels, number - group, group_size)
            watch.add(loss, logits, targets)
            now = time.perf_counter()
            if now - reported > REPORT_SECONDS:
                reported = now
                mean_loss, top1_percent = watch.read()
                speed = watch.images * world_size / (now - start)
                on_progress(number + 1, mean_loss, top1_percent, speed)
        watch.read()
        seconds = time.perf_counter() - start
        sums = add_up(accelerator, watch.sums())
        passes, images_seen = float(sums[2]), int(sums[3])
        return EpochStats(
            loss=float(sums[0]) / passes,
            top1_percent=100 * float(sums[1]) / images_seen,
            seconds=seconds,
            wait_seconds=waited,
            images=images_seen,
        )

    def num_batches(self, num_samples: int) -> int:
        """Passes per process and epoch."""
        return num_train_batches(num_samples, self.batch_size, self.accelerator.num_processes)

    def _pass(
        self, images: Tensor, labels: Tensor, place: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward; after the last pass of a group, one update.

        Returns:
            Loss, logits (B, classes) and targets: labels (B,), or what mixup made of them,
            (B, classes).
        """
        accelerator = self.accelerator
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        last = place == group_size - 1
        # Only the last pass of a group needs the other processes' gradients.
        sync = contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped)
        with sync:
            logits = self.wrapped(images)
            loss: Tensor = self.criterion(logits.float(), targets)
            accelerator.backward(loss / group_size)
        if last:
            if self.clip_grad:
                accelerator.clip_grad_norm_(self.wrapped.parameters(), self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.updates)
            if self.ema is not None:
                self.ema.update(self.model, step=self.updates)
        return loss.detach(), logits.detach(), targets

    @property
    def best_weights(self) -> nn.Module:
        """The model to evaluate and keep: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.module


class _LossWatch:
    """Collects losses and right answers on the device and reads them now and then."""

    def __init__(self, epoch: int, num_batches: int) -> None:
        self.epoch = epoch
        self.num_batches = num_batches
        self.pending: list[Tensor] = []
        self.loss_sum = 0.0
        self.right = 0
        self.passes = 0
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        # Of two mixed images, the heavier one counts.
        labels = targets.argmax(dim=-1) if targets.dim() == 2 else targets
        right = (logits.argmax(dim=-1) == labels).sum()
        self.pending.append(torch.stack([loss.float(), right.float()]))
        self.images += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent so far; names the batch whose loss is no number."""
        if self.pending:
            rows = torch.stack(self.pending).cpu().double()  # (passes, 2)
            self.pending.clear()
            broken = (~rows[:, 0].isfinite()).nonzero()
            if len(broken):
                step = self.passes + int(broken[0]) + 1
                raise DivergedError(
                    f"The loss became {float(rows[int(broken[0]), 0])} in epoch {self.epoch}, step "
                    f"{step} of {self.num_batches}; lower lr or set clip_grad=1. The best weights "
                    "so far are kept."
                )
            self.loss_sum += float(rows[:, 0].sum())
            self.right += int(rows[:, 1].sum())
            self.passes += len(rows)
        return self.loss_sum / self.passes, 100 * self.right / self.images

    def sums(self) -> Tensor:
        values = [self.loss_sum, self.right, self.passes, self.images]
        return torch.tensor(values, dtype=torch.float64)
