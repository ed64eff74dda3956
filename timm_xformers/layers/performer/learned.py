"""Performer attention with a learned feature map: f_theta in place of random features.

The generalised kernel of Choromanski et al., 2021 (arXiv:2009.14794), section 3.1, with
phi(x) = softplus(W2 relu(W1 x')) + 1e-3, x' = x / D^(1/4). One map serves all heads, queries and
keys, so that the kernel stays symmetric. Per head, time grows as N * D * (m + 2 D).
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from timm_xformers.layers.heads import HeadsAttention, autocasts, working_dtype
from timm_xformers.layers.linear import FEATURE_EPS, mix_features

__all__ = ["LearnedPerformerAttention"]


def mix_trained(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Linear attention per head with features from a network, raised by ``eps``."""
    if torch.jit.is_scripting():
        return _mix(phi_q, phi_k, v, eps, attn_mask, is_causal)
    elif autocasts(v.device.type):  # it would sum features over tokens in half precision
        with torch.autocast(v.device.type, enabled=False):
            return _mix(phi_q, phi_k, v, eps, attn_mask, is_causal)
    return _mix(phi_q, phi_k, v, eps, attn_mask, is_causal)


def _mix(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    dtype = working_dtype(v.dtype, wide=is_causal)
    phi_q, phi_k = phi_q.to(dtype) + eps, phi_k.to(dtype) + eps
    return mix_features(phi_q, phi_k, v.to(dtype), False, attn_mask, is_causal).to(v.dtype)


# Autocast's state and masks decide what is computed: torch.fx calls this as it is.
torch.fx.wrap("mix_trained")


class LearnedPerformerAttention(HeadsAttention):
    """Multi-head linear attention on tokens (B, N, C) with trained features.

    Args:
        num_features: m.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: ``num_features`` below 1, or what `HeadsAttention` refuses.
    """

    mechanism = "performer_learned"
    has_map = False
    masks = "keys"

    def __init__(
        self, dim: int, num_heads: int = 8, *, num_features: int = 64, **kwargs: Any
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1, e.g. 64.")
        super().__init__(dim, num_heads, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.feature_scale = self.head_dim**-0.25
        self.feature_eps = FEATURE_EPS
        self.feature_net = nn.Sequential(
            nn.Linear(self.head_dim, 2 * self.head_dim, **dd),
            nn.ReLU(),
            nn.Linear(2 * self.head_dim, num_features, **dd),
            nn.Softplus(),
        )

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Linear attention per head, (B, H, N, D)."""
        # The features' network casts as its own layers do, under autocast, quantised or offloaded.
        phi_q = self.feature_net(q * self.feature_scale)
        phi_k = self.feature_net(k * self.feature_scale)
        return mix_trained(phi_q, phi_k, v, self.feature_eps, attn_mask, is_causal)
