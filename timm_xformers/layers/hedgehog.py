"""Hedgehog attention: linear attention whose features learn to mimic the softmax.

Zhang et al., "The Hedgehog & the Porcupine", 2024 (arXiv:2402.04347): per head, features
phi(x) = [softmax(W x), softmax(-W x)] over the elements of the head, 2 D of them, from a trained
map W that starts as the identity; queries and keys have maps of their own. Per head, time grows as
N * D^2.

As in the paper the maps see queries and keys unscaled: W takes over the 1 / sqrt(D) of exact
attention. Features are exponentials, so they go through their logarithms, see `linear`: no added
epsilon, and no normaliser that can be zero. Without training that matches them with exact attention
(the paper's distillation) they are no better than other features.

Departures: W has no bias, which would only weigh the features.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from timm_xformers.layers.heads import HeadsAttention, autocasts, working_dtype
from timm_xformers.layers.linear import mix_features

__all__ = ["HedgehogAttention", "hedgehog_attention"]


def _log_features(x: Tensor, weight: Tensor) -> Tensor:
    """Logarithms of the features: x (B, H, N, D), weight (H, D, D) to (B, H, N, 2 D)."""
    y = x @ weight.transpose(-2, -1)
    return torch.cat([y.log_softmax(dim=-1), (-y).log_softmax(dim=-1)], dim=-1)


def _hedgehog(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    log_q, log_k = _log_features(q, weight_q), _log_features(k, weight_k)
    return mix_features(log_q, log_k, v, True, attn_mask, is_causal, "hedgehog")


def hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Mix tokens with weights phi(q) . phi(k), normalised per query.

    Args:
        q: Queries (B, H, N, D), unscaled.
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        weight_q: Map of the queries of each head (H, D, D).
        weight_k: Map of the keys (H, D, D).
        attn_mask: None, or (B, 1, 1, S): bool (True = attend) or an additive bias per key. A
            query without any key gives zeros.
        is_causal: Let a token see itself and earlier ones only (N = S).

    Returns:
        (B, H, N, E) in the type of ``v``. Features are float32 at least.

    Raises:
        ValueError: ``attn_mask`` differs between queries.
    """
    dtype = working_dtype(q.dtype, wide=True)
    weight_q, weight_k = weight_q.to(dtype), weight_k.to(dtype)
    q, k = q.to(dtype), k.to(dtype)
    if torch.jit.is_scripting():
        x = _hedgehog(q, k, v, weight_q, weight_k, attn_mask, is_causal)
    elif autocasts(q.device.type):  # it would round exponents to three digits
        with torch.autocast(q.device.type, enabled=False):
            x = _hedgehog(q, k, v, weight_q, weight_k, attn_mask, is_causal)
    else:
        x = _hedgehog(q, k, v, weight_q, weight_k, attn_mask, is_causal)
    return x.to(v.dtype)


# Masks decide what is computed, which torch.fx cannot follow: it calls this as it is.
torch.fx.wrap("hedgehog_attention")


class HedgehogAttention(HeadsAttention):
    """Multi-head Hedgehog attention on tokens (B, N, C).

    In checkpoints its own parameters are ``hedgehog_q`` and ``hedgehog_k``, (H, D, D) each.

    Arguments are those of `HeadsAttention`.
    """

    mechanism = "hedgehog"
    has_map = False
    masks = "keys"

    def __init__(self, dim: int, num_heads: int = 8, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        shape = (self.num_heads, self.head_dim, self.head_dim)
        self.hedgehog_q = nn.Parameter(torch.empty(shape, **dd))
        self.hedgehog_k = nn.Parameter(torch.empty(shape, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the maps to the identity."""
        for weight in (self.hedgehog_q, self.hedgehog_k):
            weight.copy_(torch.eye(self.head_dim, dtype=weight.dtype, device=weight.device))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Hedgehog attention per head, (B, H, N, D)."""
        return hedgehog_attention(
            q, k, v, self.hedgehog_q, self.hedgehog_k, attn_mask=attn_mask, is_causal=is_causal
        )
