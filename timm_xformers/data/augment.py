"""Augmentation of whole batches, with parameters of their own for every image.

The parameters of all images are drawn once per epoch from (seed, epoch) and looked up by the
image's position in the data set. So they depend neither on the batch an image falls into nor on
the process that trains on it, and an epoch can be entered at any batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.data.pixel_ops import take_pixels
from timm_xformers.data.rand_augment import EpochPolicy
from timm_xformers.data.sampling import derive_seed

__all__ = ["Augmentation", "EpochAugmentation"]

# Range of the erased share of the area and of its aspect ratio (Zhong et al., arXiv:1708.04896).
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augmentation:
    """Strengths; zero switches a transform off.

    Attributes:
        hflip: Probability of a horizontal flip.
        crop_pad: Largest shift along each axis, whole pixels; what comes in is black.
        rotate_degrees: Largest turn to either side.
        shear_degrees: Largest horizontal shear to either side.
        zoom: Scale is drawn between 1 / (1 + zoom) and 1 + zoom, evenly in its logarithm.
        re_prob: Probability that a rectangle is replaced by the mean.
        cutout: Side in pixels of a square that is replaced by the mean in every image. Its centre
            is any pixel, so that a part may lie outside (DeVries and Taylor, arXiv:1708.04552).
        rand_augment: Policy for `EpochPolicy`; None for none.
    """

    hflip: float = 0.0
    crop_pad: int = 0
    rotate_degrees: float = 0.0
    shear_degrees: float = 0.0
    zoom: float = 0.0
    re_prob: float = 0.0
    cutout: int = 0
    rand_augment: str | None = None

    @property
    def resamples(self) -> bool:
        """Whether any transform puts pixels between the places of others."""
        return any((self.rotate_degrees, self.shear_degrees, self.zoom))


class EpochAugmentation:
    """The transforms of one epoch, drawn for all ``num_samples`` images from the run's seed."""

    def __init__(self, strengths: Augmentation, num_samples: int, seed: int, epoch: int) -> None:
        self.strengths = strengths
        rng = torch.Generator().manual_seed(derive_seed(seed, "augment", epoch))
        # Every transform has its columns whether it is on or not: switching one on leaves the
        # others' draws as they were.
        self.draws = torch.rand(num_samples, 11, generator=rng)
        # What was added later has a generator of its own, for the same reason.
        rng = torch.Generator().manual_seed(derive_seed(seed, "cutout", epoch))
        self.centres = torch.rand(num_samples, 2, generator=rng)
        text = strengths.rand_augment
        self.policy = None if text is None else EpochPolicy(text, num_samples, seed, epoch)

    def change(self, images: Tensor, positions: Tensor) -> Tensor:
        """Flip, shift, turn, shear and zoom, then the policy of `Augmentation.rand_augment`.

        Args:
            images: Images in [0, 255] (B, C, H, W), uint8 or float, whose background is 0.
            positions: Place of each image in the data set (B,).

        Returns:
            (B, C, H, W); of uint8 images, uint8 ones, unless they were resampled.
        """
        if self.strengths.resamples:
            images = self._resample(images.float(), positions)
        elif self.strengths.hflip or self.strengths.crop_pad:
            images = self._shift(images, positions)
        return images if self.policy is None else self.policy.apply(images, positions)

    def erase(self, images: Tensor, positions: Tensor) -> Tensor:
        """Set rectangles of some images to 0, which is the mean of normalised images.

        Args:
            images: Normalised images (B, C, H, W).
            positions: Place of each image in the data set (B,).

        Returns:
            (B, C, H, W).
        """
        if self.strengths.re_prob:
            images = _blank(images, *self._rectangles(positions, *images.shape[-2:]))
        if self.strengths.cutout:
            side = torch.full((len(positions),), self.strengths.cutout)
            top, left = (
                (self.centres[positions, axis] * images.shape[axis + 2]).floor() - side // 2
                for axis in (0, 1)
            )
            images = _blank(images, top, left, side, side)
        return images

    def _rectangles(
        self, positions: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width (B,) of what is erased; height 0 where nothing is."""
        draws = self.draws[positions]
        area = ERASED_AREA[0] + draws[:, 7] * (ERASED_AREA[1] - ERASED_AREA[0])
        low, high = (math.log(ratio) for ratio in ERASED_ASPECT)
        aspect = torch.exp(low + draws[:, 8] * (high - low))
        tall = (height * (area * aspect).sqrt()).clamp(1, height).round()
        wide = (width * (area / aspect).sqrt()).clamp(1, width).round()
        top = (draws[:, 9] * (height - tall + 1)).floor()
        left = (draws[:, 10] * (width - wide + 1)).floor()
        tall = torch.where(draws[:, 6] < self.strengths.re_prob, tall, 0)
        return top, left, tall, wide

    def _shift(self, images: Tensor, positions: Tensor) -> Tensor:
        """Flip and shift by whole pixels: `_resample` without turns, exactly and faster."""
        height, width = images.shape[-2:]
        draws, shift = self.draws[positions], self._whole_pixels(positions)  # (B, 11), (B, 2)
        columns = torch.arange(width) - shift[:, :1]  # (B, W)
        mirrored = draws[:, :1] < self.strengths.hflip
        columns = torch.where(mirrored, width - 1 - columns, columns).long()
        rows = (torch.arange(height) - shift[:, 1:]).long()  # (B, H)
        device = images.device
        return take_pixels(images, rows[:, :, None].to(device), columns[:, None].to(device))

    def _resample(self, images: Tensor, positions: Tensor) -> Tensor:
        """All moves in one bilinear sampling; whole-pixel ones hit pixel centres: no blur."""
        height, width = images.shape[-2:]
        theta = self._inverse_affine(positions, height, width).to(images)  # (B, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (B, H, W, 2)
        return F.grid_sample(images, grid, align_corners=False)

    def _whole_pixels(self, positions: Tensor) -> Tensor:
        """Shifts (B, 2) along x and y, whole pixels in [-pad, pad]."""
        pad = self.strengths.crop_pad
        return (self.draws[positions, 1:3] * (2 * pad + 1)).floor() - pad

    def _inverse_affine(self, positions: Tensor, height: int, width: int) -> Tensor:
        """Matrices (B, 2, 3) that say for each output point where its value comes from."""
        on = self.strengths
        draws = self.draws[positions]
        signed = 2 * draws - 1
        mirror = torch.where(draws[:, 0] < on.hflip, -1.0, 1.0)
        angle = signed[:, 3] * math.radians(on.rotate_degrees)
        slope = torch.tan(signed[:, 4] * math.radians(on.shear_degrees))
        scale = torch.exp(-signed[:, 5] * math.log1p(on.zoom))
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # Coordinates run from -1 to 1 over the image, so one pixel is 2 / W; dividing the mixed
        # terms by the aspect ratio keeps a turn a turn on images that are not square.
        stretch = height / width
        linear = torch.stack(
            [
                torch.stack([mirror * cos, mirror * (cos * slope - sin) * stretch], dim=-1),
                torch.stack([sin / stretch, sin * slope + cos], dim=-1),
            ],
            dim=-2,
        )  # (B, 2, 2)
        shift = self._whole_pixels(positions) * torch.tensor([2 / width, 2 / height])
        # The shift is applied to the output, after the linear part: a whole pixel stays one.
        offset = -(linear @ shift.unsqueeze(-1))  # (B, 2, 1)
        return torch.cat([linear, offset], dim=-1)


def _blank(images: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    """Set one rectangle (all arguments (B,)) of each image (B, C, H, W) to 0."""
    rows, columns = (torch.arange(side) for side in images.shape[-2:])
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # (B, H)
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # (B, W)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(inside.to(images.device), 0.0)
