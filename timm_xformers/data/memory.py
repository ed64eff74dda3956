"""Small data sets as uint8 tensors on the device, augmented in batches.

Decoding happens once, so that afterwards a batch costs an index and a few tensor operations.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_xformers.data.augment import Augmentation, EpochAugmentation
from timm_xformers.data.damaged import refuse_damaged
from timm_xformers.data.loader import map_positions
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.data.split import Split
from timm_xformers.errors import UserError

__all__ = ["MemoryBatches", "decode"]

# Beyond this, holding a split in memory is more likely a mistake than a wish.
LARGEST_SPLIT_MIB = 4096
# Fewer images are decoded before other processes have started.
SHARED_FROM = 5000


def decode(split: Split, preprocessing: Preprocessing, num_workers: int = 0) -> Tensor:
    """Decode a split to uint8 images (N, C, H, W), resized and cropped as in evaluation.

    Many files are shared by so many worker processes; 0 decodes in this one.

    Raises:
        UserError: The split would take more than `LARGEST_SPLIT_MIB`, or has unreadable images.
    """
    shape = preprocessing.shape
    size_mib = len(split) * math.prod(shape) / 2**20
    if size_mib > LARGEST_SPLIT_MIB:
        raise UserError(
            f"{len(split)} images of {'x'.join(map(str, shape))} take {size_mib:.0f} MiB, and "
            f"{LARGEST_SPLIT_MIB} are held in memory; use --set in_memory=false or a smaller "
            "img_size."
        )
    shared = split.encoded and len(split) >= SHARED_FROM
    pixels = map_positions(
        functools.partial(_pixels, split, preprocessing, preprocessing.transform()),
        len(split),
        num_workers if shared else 0,
    )
    images = torch.empty((len(split), *shape), dtype=torch.uint8)
    problems = []
    for row, found in enumerate(pixels):
        if isinstance(found, str):
            problems.append((split.name(row), found))
        else:
            images[row] = torch.from_numpy(found)
    refuse_damaged(problems, len(split))
    return images


def _pixels(
    split: Split,
    preprocessing: Preprocessing,
    transform: Callable[[Any], Tensor],
    position: int,
) -> Any:
    """Array (C, H, W) of an image, or what is wrong with it."""
    try:
        image = split.image(position)
    except UserError:
        return split.problem(position)
    # Arrays, not tensors: those travel between processes by a file each.
    size = preprocessing.shape[1:]
    # Nothing to resample: three times as fast as timm's transform.
    if image.size == size and preprocessing.crop_pct == 1.0:
        return np.ascontiguousarray(np.array(image).reshape(*size, -1).transpose(2, 0, 1))
    return transform(image).numpy()


class MemoryBatches:
    """Batches of a decoded split.

    Args:
        images: uint8 images (N, C, H, W).
        labels: Classes (N,), or marks (N, C).
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        device: Where the images are kept and the batches made.
        augmentation: None for evaluation.
        seed: Seed of the run, for the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.mean = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(-1, 1, 1)
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels for each tensor of positions, as `Batches` does."""
        epoch_augmentation = None
        if self.augmentation is not None:
            epoch_augmentation = EpochAugmentation(
                self.augmentation, len(self), seed=self.seed, epoch=epoch
            )
        for positions in order:
            rows = positions.to(self.images.device)
            images = self.images[rows]
            if epoch_augmentation is not None:
                images = epoch_augmentation.change(images, positions)
            images = images.float().sub_(self.mean).div_(self.std)
            if epoch_augmentation is not None:
                images = epoch_augmentation.erase(images, positions)
            yield images, self.labels[rows]
