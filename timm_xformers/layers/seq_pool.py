"""Sequence pooling: a learned weighted mean of tokens in the place of a class token.

Hassani et al., "Escaping the big data paradigm with compact transformers", 2021 (arXiv:2104.05704),
section 3.2.
"""

import torch
from torch import Tensor, nn

__all__ = ["SeqPool"]


class SeqPool(nn.Module):
    """Pool tokens (B, N, C) to (B, C) with weights softmax over tokens of a linear map to one."""

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        """Start close to the mean, as the authors do."""
        nn.init.trunc_normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens (B, N, C) to (B, C)."""
        weight = self.score(x).softmax(dim=1)  # (B, N, 1)
        pooled: Tensor = (weight.transpose(1, 2) @ x).squeeze(1)
        return pooled
