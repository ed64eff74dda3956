"""Exact softmax attention: the baseline, and what the other mechanisms approximate.

Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762), eq. 1. Time grows as
N^2 * D per head; memory as N * D with PyTorch's fused kernels.
"""

import torch
import torch.fx
from torch import Tensor

from timm_xformers.layers.heads import HeadsAttention, attend, attention_map, may_fuse

__all__ = ["SoftmaxAttention", "softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Mix tokens with weights softmax(q k^T / sqrt(D)), by PyTorch's fused attention if it may.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        attn_mask: Bool (True = attend) or additive, broadcastable to (B, H, N, S). A query without
            any key gives zeros. Ignored when ``is_causal``, as in timm.
        is_causal: Let a token see itself and earlier ones only.
        dropout_p: Dropout probability on the map.

    Returns:
        (B, H, N, E).
    """
    return attend(q, k, v, attn_mask, dropout_p, is_causal)


# Masks decide what is computed, which torch.fx cannot follow: it calls these as they are.
torch.fx.wrap("attend")
torch.fx.wrap("attention_map")


class SoftmaxAttention(HeadsAttention):
    """Multi-head exact attention on tokens (B, N, C); equals timm's `Attention`.

    Arguments are those of `HeadsAttention`. After ``timm.layers.set_fused_attn(False)`` the maps
    pass through ``attn_drop``, where `timm.utils.AttentionExtract` (``method="hook"``) finds them.
    """

    mechanism = "softmax"

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Exact attention per head, (B, H, N, D)."""
        if not may_fuse():
            # As timm has it: AttentionExtract finds the maps at attn_drop.
            weights = attention_map(q, k, attn_mask, is_causal).to(v.dtype)
            mixed: Tensor = self.attn_drop(weights) @ v
            return mixed
        dropout_p = self.attn_drop.p if self.training else 0.0
        return attend(q, k, v, attn_mask, dropout_p, is_causal)
