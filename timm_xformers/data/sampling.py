"""Which sample is drawn when: pure functions of the seed, so that a run can be continued exactly.

No generator state lives from one batch to the next. An epoch's order follows from (seed, epoch), a
sample's augmentation from (seed, epoch, index), the noise of one pass (dropout, mixup) from
(seed, epoch, batch, rank). What happens at one point of a run therefore does not depend on how the
run got there, and the order of samples does not depend on the number of processes.
"""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "derive_seed",
    "eval_batches",
    "num_train_batches",
    "seed_everything",
    "seed_host",
    "stratified_split",
    "train_batches",
]


def derive_seed(*parts: int | str) -> int:
    """Mix any parts into a seed of 63 bits; nearby parts give unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed all generators that timm and torch draw from, those of devices too."""
    seed_host(seed)
    torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed the three generators that decoding and transforms draw from.

    Once per image, `torch.manual_seed` would be dear: it leaves word for devices not yet in use.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's Mixup and RandAugment use numpy's global generator
    torch.default_generator.manual_seed(seed)


def num_train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Batches per process and epoch; a last, smaller one is left out (another one every epoch)."""
    return num_samples // (batch_size * world_size)


def train_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[Tensor]:
    """Positions of one process's training batches in one epoch.

    All processes cut the same permutation, so batch k of all ranks together is batch k of a single
    process with ``world_size * batch_size`` images.

    Returns:
        Index tensors (batch_size,), `num_train_batches` of them.
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order = torch.randperm(num_samples, generator=rng)
    steps = num_train_batches(num_samples, batch_size, world_size)
    shape = (steps, world_size, batch_size)
    return list(order[: steps * world_size * batch_size].view(shape)[:, rank])


def eval_batches(
    num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> list[Tensor]:
    """Positions of one process's evaluation batches: over all ranks, each sample exactly once."""
    return list(torch.split(torch.arange(num_samples), batch_size))[rank::world_size]


def stratified_split(labels: Tensor, fraction: float, key: str) -> tuple[Tensor, Tensor]:
    """Hold out the same share of every class.

    The choice follows from a hash of each position, not from a generator whose algorithm a later
    release could change: a split is part of what a published figure means.

    Args:
        labels: Class of each sample (N,).
        fraction: Share to hold out; in total ``round(N * fraction)`` samples, and within each class
            the nearest smaller or larger count.
        key: Name of the split; another key, another choice.

    Returns:
        Positions to keep and positions held out, both sorted.
    """
    values = labels.tolist()
    members: dict[int, list[int]] = {}
    for position, label in enumerate(values):
        members.setdefault(label, []).append(position)

    quotas = {label: int(len(group) * fraction) for label, group in members.items()}
    missing = round(len(values) * fraction) - sum(quotas.values())
    by_remainder = sorted(
        members, key=lambda label: (quotas[label] - len(members[label]) * fraction, label)
    )
    for label in by_remainder[:missing]:
        quotas[label] += 1

    held: list[int] = []
    for label, group in members.items():
        group.sort(key=lambda position: derive_seed(key, position))
        held.extend(group[: quotas[label]])
    chosen = set(held)
    keep = [position for position in range(len(values)) if position not in chosen]
    return _positions(keep), _positions(sorted(held))


def _positions(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
