"""Fixed sinusoidal positions of a sequence, for models that do not learn theirs.

Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762), section 3.5: channel 2i holds
sin(p / 10000^(2i / C)), channel 2i + 1 the cosine of the same angle.
"""

import torch
from torch import Tensor

__all__ = ["sinusoid"]


def sinusoid(num_tokens: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Table of positions.

    Args:
        num_tokens: Number of positions N.
        dim: Token width C.
        device: Where to create the table.

    Returns:
        (1, N, C), float32.
    """
    channel = torch.arange(dim, dtype=torch.float64, device=device)
    position = torch.arange(num_tokens, dtype=torch.float64, device=device)
    frequency = 10000.0 ** (-2 * channel.div(2, rounding_mode="floor") / dim)
    angle = position.unsqueeze(1) * frequency  # (N, C)
    table = torch.where(channel.remainder(2) == 0, angle.sin(), angle.cos())
    return table.float().unsqueeze(0)
