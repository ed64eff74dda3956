"""Batches decoded from files by worker processes, with timm's transforms.

Every image draws its augmentation from (seed, epoch, position), so that neither the number of
workers nor the point at which an epoch is entered changes what a sample looks like.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_xformers.training.errors import UserError
from timm_xformers.training.order import derive_seed, seed_host
from timm_xformers.training.rawsplit import RawSplit

__all__ = ["LoaderBatches"]


class _Images(Dataset[tuple[Tensor, int]]):
    """Transformed images by (epoch, position)."""

    def __init__(self, split: RawSplit, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key
        # Without workers this runs in the training process, whose generators must not notice.
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed_host(derive_seed(self.seed, "image", epoch, position))
        try:
            image = self.transform(self.split.image(position))
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])
        return image, int(self.split.labels[position])


class _Plan:
    """A batch sampler whose batches are set before each pass, so that workers can stay alive."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class LoaderBatches:
    """Batches of a split that stays on disk.

    Args:
        split: Images and labels.
        transform: From a PIL image to a normalised tensor (C, H, W).
        device: Where the batches are delivered.
        num_workers: Decoding processes; 0 decodes in this one.
        seed: Seed of the run, for the augmentation.
    """

    def __init__(
        self,
        split: RawSplit,
        transform: Callable[[Any], Tensor],
        *,
        device: torch.device,
        num_workers: int,
        seed: int = 0,
    ) -> None:
        self.device = device
        self.num_samples = len(split)
        self.plan = _Plan()
        self.loader = DataLoader(
            _Images(split, transform, seed),
            batch_sampler=self.plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return self.num_samples

    def batches(self, order: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, C, H, W) and labels (B,) for each tensor of positions."""
        self.plan.batches = [[(epoch, int(i)) for i in positions] for positions in order]
        try:
            for images, labels in self.loader:
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except UserError as error:
            # A worker's failure arrives with its traceback as text, the message last.
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None
