"""Means of consecutive tokens as a matrix, whatever the lengths."""

import torch
from torch import Tensor

__all__ = ["slot_means"]


def slot_means(num_slots: int, length: int, device: torch.device | None = None) -> Tensor:
    """Shares of tokens in the means of consecutive ones.

    Args:
        num_slots: Number of means, n.
        length: Number of tokens N, more or less than n.
        device: Where to create them.

    Returns:
        (n, N) whole numbers, N times the share: a row's sum is N.
    """
    # Slot i covers [i, i + 1) * N / n; a token on a border counts to both in proportion. In units
    # of 1 / n all borders are whole numbers.
    slot = torch.arange(num_slots, device=device).unsqueeze(1) * length
    token = torch.arange(length, device=device) * num_slots
    upper = torch.minimum(slot + length, token + num_slots)
    return (upper - torch.maximum(slot, token)).clamp_min(0)
