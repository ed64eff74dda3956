"""Batches decoded from files by worker processes, with timm's transforms.

Every image draws its augmentation from (seed, epoch, position), so that neither the number of
workers nor the point at which an epoch is entered changes what a sample looks like.
"""

import contextlib
import itertools
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from timm_xformers.data.sampling import derive_seed, seed_host
from timm_xformers.data.split import Split
from timm_xformers.errors import UserError

__all__ = ["LoaderBatches", "killed_worker", "map_positions", "usable_cores"]


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Transformed images, and their labels, by (epoch, position)."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, position = key
        seed = derive_seed(self.seed, "image", epoch, position)
        # Without workers this is the training process, whose generators must not notice.
        with contextlib.nullcontext() if get_worker_info() else _own_generators():
            seed_host(seed)
            image = self.transform(self.split.image(position))
        return image, self.split.labels[position]


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    """Put the generators of this process back where they were."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class _Plan:
    """A batch sampler whose batches are set before each pass, so that workers can stay alive."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Calls(Dataset[Any]):
    """What a function makes of each position."""

    def __init__(self, function: Callable[[int], Any], count: int) -> None:
        self.function = function
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Any:
        return self.function(position)


def map_positions(function: Callable[[int], Any], count: int, num_workers: int) -> Iterator[Any]:
    """What a function makes of 0 to count - 1, in order, by worker processes; 0 calls it here.

    Processes, not threads: a tar's reader has one place in the file.
    """
    loader: DataLoader[Any] = DataLoader(
        _Calls(function, count),
        batch_size=32,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the run's own is left as it is
    )
    return itertools.chain.from_iterable(loader)


class LoaderBatches:
    """Batches of a split that stays on disk.

    Args:
        split: Images and labels.
        transform: From a PIL image to uint8 (C, H, W), a quarter of what floats would take between
            processes.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        device: Where the batches are delivered.
        num_workers: Decoding processes; 0 decodes in this one.
        seed: Seed of the run, for the augmentation.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Any], Tensor],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        num_workers: int,
        seed: int = 0,
    ) -> None:
        self.device = device
        self.mean = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(-1, 1, 1)
        self.num_samples = len(split)
        self.plan = _Plan()
        self.loader = DataLoader(
            _Images(split, transform, seed),
            batch_sampler=self.plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return self.num_samples

    def batches(self, order: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels for each tensor of positions, as `Batches` does."""
        self.plan.batches = [[(epoch, int(i)) for i in positions] for positions in order]
        try:
            for images, labels in self.loader:
                pixels = images.to(self.device, non_blocking=True).float()
                yield (
                    pixels.sub_(self.mean).div_(self.std),
                    labels.to(self.device, non_blocking=True),
                )
        except UserError as error:
            # A worker's failure arrives with its traceback as text, the message last.
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None
        except RuntimeError as error:
            raise killed_worker(error) or error from None


def killed_worker(error: BaseException) -> UserError | None:
    """A sentence for PyTorch's report of a dead worker, which comes up anywhere; else None."""
    if not (found := re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))):
        return None
    return UserError(
        f"Decoding process {found[1]} was killed by the system, most likely for lack of memory "
        "(on Linux, `dmesg` tells); lower num_workers or batch_size, and go on with --resume."
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore what a whole process group is sent: the training process saves, then ends workers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def usable_cores() -> int:
    """Cores that this process may run on, which a container or ``taskset`` can make few."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
