"""RandAugment, TrivialAugment and AutoAugment on batches.

Cubuk et al., "RandAugment", 2019 (arXiv:1909.13719); Müller and Hutter, "TrivialAugment", 2021
(arXiv:2103.10158), its wide space; Cubuk et al., "AutoAugment", 2018 (arXiv:1805.09501). Spaces and
strengths are those of torchvision's classes of these names.

The images of a batch are grouped by the operation drawn for them, and each group is changed at
once. Departure: TrivialAugment's translation of up to 32 pixels is limited to the side of smaller
images.
"""

import functools
import re

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from timm_xformers.data.pixel_ops import OPS
from timm_xformers.data.sampling import derive_seed
from timm_xformers.errors import UsageError, nearest

__all__ = ["EpochPolicy", "check_policy"]

NAMES = tuple(OPS)
# RandAugment and TrivialAugment draw evenly from all operations but this one.
DRAWN = tuple(name for name in NAMES if name != "Invert")
# Strengths of these come with either sign.
BLENDED = ("Brightness", "Color", "Contrast", "Sharpness")
MOVED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = torch.tensor([name in BLENDED + MOVED for name in NAMES])
BINS = 31
SEARCHED = {f"autoaugment-{policy.value}": policy for policy in AutoAugmentPolicy}
RANDOM = re.compile(r"n([1-9])-m(\d+)")


def check_policy(text: str) -> None:
    """Refuse a policy that does not exist.

    Args:
        text: ``trivial``, ``nN-mM`` (N operations, 1 to 9, at strength M, 0 to 30) or
            ``autoaugment-`` with a data set.

    Raises:
        UsageError: It is none of these.
    """
    match = RANDOM.fullmatch(text)
    if text == "trivial" or text in SEARCHED or (match and int(match[2]) < BINS):
        return
    known = ["trivial", *SEARCHED]
    raise UsageError(
        f"rand_augment={text!r} is unknown{nearest(text, known)}; use {', '.join(known)}, or nN-mM "
        f"such as n2-m9 for N operations (1 to 9) of strength M (0 to {BINS - 1})."
    )


class EpochPolicy:
    """The operations of one epoch, drawn for all ``num_samples`` images from the run's seed.

    The policy's text is what `check_policy` takes.
    """

    def __init__(self, text: str, num_samples: int, seed: int, epoch: int) -> None:
        self.text = text
        match = RANDOM.fullmatch(text)
        self.level = int(match[2]) if match else None
        self.steps = int(match[1]) if match else 2 if text in SEARCHED else 1
        # Apart from the other transforms' generator, whose draws must not depend on this one.
        rng = torch.Generator().manual_seed(derive_seed(seed, "rand_augment", epoch))
        self.draws = torch.rand(num_samples, self.steps, 3, generator=rng)

    def apply(self, images: Tensor, positions: Tensor) -> Tensor:
        """Change a batch.

        Args:
            images: In [0, 255] (B, C, H, W); floats are rounded.
            positions: Place of each image in the data set (B,).

        Returns:
            uint8 images (B, C, H, W).
        """
        if images.is_floating_point():
            images = images.round().clamp_(0, 255)
        images = images.to(torch.uint8, copy=True)
        ops, strengths = self.choices(positions, *images.shape[-2:])
        for op, strength in zip(ops.unbind(1), strengths.unbind(1), strict=True):
            for number in sorted(set(op.tolist())):
                group = (op == number).nonzero().squeeze(1)
                rows = group.to(images.device)
                images[rows] = OPS[NAMES[number]](images[rows], strength[group])
        return images

    def choices(self, positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What happens to each image.

        Args:
            positions: Place of each image in the data set (B,).
            height: Of the images.
            width: Of the images.

        Returns:
            Operations (B, steps) as places in `NAMES`, and their strengths (B, steps) in float64.
        """
        choice, level, sign = self.draws[positions].unbind(-1)  # (B, steps) each
        space = _space(self.text, height, width)
        if self.text in SEARCHED:
            table, probability, bins = _sub_policies(SEARCHED[self.text])
            # One sub-policy for both steps; what would be the level decides whether a step is done.
            chosen = (choice[:, 0] * len(table)).long()
            done = level <= probability[chosen]
            ops, bin_ = torch.where(done, table[chosen], NAMES.index("Identity")), bins[chosen]
        else:
            ops = (choice * len(DRAWN)).long()
            bin_ = (level * BINS).long() if self.level is None else torch.full_like(ops, self.level)
        negative = (sign < 0.5) & SIGNED[ops]
        strength = space[ops, bin_]
        return ops, torch.where(negative, -strength, strength)


@functools.lru_cache(maxsize=8)
def _space(text: str, height: int, width: int) -> Tensor:
    """Strengths (operations, bins) in the order of `NAMES`; 0 for those without."""
    wide = text == "trivial"
    bins = 10 if text in SEARCHED else BINS
    reach_x, reach_y = (min(32.0, side) if wide else 150 / 331 * side for side in (width, height))
    largest = {
        "ShearX": 0.99 if wide else 0.3,
        "ShearY": 0.99 if wide else 0.3,
        "TranslateX": reach_x,
        "TranslateY": reach_y,
        "Rotate": 135.0 if wide else 30.0,
        **dict.fromkeys(BLENDED, 0.99 if wide else 0.9),
    }
    rows = {name: torch.linspace(0.0, value, bins) for name, value in largest.items()}
    dropped_bits = 6 if wide else 4
    rows["Posterize"] = 8 - (torch.arange(bins) / ((bins - 1) / dropped_bits)).round()
    rows["Solarize"] = torch.linspace(255.0, 0.0, bins)
    nothing = torch.zeros(bins)
    return torch.stack([rows.get(name, nothing) for name in NAMES]).double()


@functools.lru_cache
def _sub_policies(policy: AutoAugmentPolicy) -> tuple[Tensor, Tensor, Tensor]:
    """Operations, their probabilities and bins, each (sub-policies, 2)."""
    table = AutoAugment(policy).policies
    operations = [[NAMES.index(name) for name, _, _ in pair] for pair in table]
    probabilities = [[probability for _, probability, _ in pair] for pair in table]
    bins = [[level or 0 for _, _, level in pair] for pair in table]
    return torch.tensor(operations), torch.tensor(probabilities), torch.tensor(bins)
