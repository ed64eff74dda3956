"""Small data sets as uint8 tensors on the device, augmented in batches.

Decoding happens once, so that afterwards a batch costs an index and a few tensor operations.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from timm_xformers.training.augment import Augmentation, EpochAugmentation
from timm_xformers.training.errors import UserError
from timm_xformers.training.preprocessing import Preprocessing
from timm_xformers.training.rawsplit import RawSplit
from timm_xformers.training.readable import refuse_unreadable

__all__ = ["MemoryBatches", "decode"]

# Beyond this, holding a split in memory is more likely a mistake than a wish.
LARGEST_SPLIT_MIB = 4096


def decode(split: RawSplit, preprocessing: Preprocessing) -> Tensor:
    """Decode a split, resized and cropped as in evaluation.

    Returns:
        uint8 images (N, C, H, W).

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
    size = (preprocessing.img_size, preprocessing.img_size)
    fits = size if preprocessing.crop_pct == 1.0 else None
    transform = preprocessing.transform(normalize=False)
    images = torch.empty((len(split), *shape), dtype=torch.uint8)
    problems = {}
    for row in range(len(split)):
        try:
            image = split.image(row)
        except UserError as error:
            problems[row] = str(error.__cause__)
            continue
        if image.size == fits:  # nothing to resample: three times as fast as timm's transform
            pixels = torch.from_numpy(np.array(image))
            images[row] = pixels.view(*size, -1).permute(2, 0, 1)
        else:
            images[row] = transform(image)
    refuse_unreadable(split, problems)
    return images


class MemoryBatches:
    """Batches of a decoded split.

    Args:
        images: uint8 images (N, C, H, W).
        labels: Classes (N,).
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
        """Yield normalised images (B, C, H, W) and labels (B,) for each tensor of positions."""
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
