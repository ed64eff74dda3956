"""Linformer attention: keys and values projected along the sequence.

Wang et al., "Linformer", 2020 (arXiv:2006.04768), eq. 7: softmax(q (E K)^T / sqrt(D)) (F V) with
E and F of shape (k, N). Per head, time grows as N * k * D.

Departures from the authors' code, each pinned by a test:

- E and F start as means of consecutive tokens instead of uniform noise: k = N is the identity and
  gives exact attention, and weights of exact attention keep working when they are loaded.
- A left-out token contributes nothing to E K and F V, and a slot made of left-out tokens only is
  hidden from queries.
"""

from typing import Any

import torch
import torch.fx
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.heads import HeadsAttention, attend
from timm_xformers.layers.masks import kept_keys, refuse_causal
from timm_xformers.layers.means import slot_means

__all__ = ["LinformerAttention", "linformer_attention", "resample_projection"]

# Where a projection is held before the number of tokens is known.
POINTS = 256


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_k: Tensor,
    proj_v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Mix tokens with attention to k projected keys and values.

    Args:
        q: Queries (B, H, N, D), unscaled.
        k: Keys (B, H or 1, S, D).
        v: Values (B, H or 1, S, E).
        proj_k: E (k, S).
        proj_v: F (k, S).
        attn_mask: None, or (B, 1, 1, S): bool (True = attend) or additive with one value for keys
            that count and one at least 80 lower for others. A query without any key gives zeros.
        dropout_p: Dropout probability on the (N, k) map.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: ``attn_mask`` differs between queries or weighs keys that count, or the
            projections fit another length.
    """
    if proj_k.shape[1] != k.shape[-2]:
        raise ValueError(
            f"The Linformer projection is for {proj_k.shape[1]} tokens and got {k.shape[-2]}; use "
            "that many, or change the model with set_input_size()."
        )
    keep = kept_keys(attn_mask, "linformer")
    slots: Tensor | None = None
    if keep is not None:
        weight = keep.to(k.dtype)
        k, v = k * weight, v * weight
        slots = (proj_k.abs() @ weight.to(proj_k.dtype)).transpose(-2, -1) > 0  # (..., 1, k)
    # A single key and value head is projected once and then shared.
    k = _project(proj_k, k).expand(-1, q.shape[1], -1, -1)  # (B, H, k, D)
    v = _project(proj_v, v).expand(-1, q.shape[1], -1, -1)
    return attend(q, k, v, slots, dropout_p)


def _project(proj: Tensor, x: Tensor) -> Tensor:
    """Keys or values (B, H, S, D) times (k, S): (B, H, k, D), all heads in one product."""
    B, H, S, D = x.shape
    tokens = x.transpose(1, 2).reshape(-1, S, H * D)  # a view of what a joint projection gives
    short = torch.bmm(proj.to(x.dtype).expand(B, -1, -1), tokens)
    return torch.unflatten(short, -1, [H, D]).transpose(1, 2)


def resample_projection(
    proj: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Interpolate a projection to another grid of tokens, keeping each slot's total weight.

    Args:
        proj: (k, num_prefix_tokens + old grid).
        new_size: New grid (rows, columns).
        old_size: Old grid (rows, columns).
        num_prefix_tokens: Leading tokens outside the grid, copied.

    Returns:
        (k, num_prefix_tokens + new grid).
    """
    columns = resample_abs_pos_embed(
        proj.T.unsqueeze(0),
        new_size=list(new_size),
        old_size=list(old_size),
        num_prefix_tokens=num_prefix_tokens,
        interpolation="bilinear",
    )[0].T
    ratio = (old_size[0] * old_size[1]) / (new_size[0] * new_size[1])
    return torch.cat([columns[:, :num_prefix_tokens], columns[:, num_prefix_tokens:] * ratio], 1)


def fit_length(proj: Tensor, length: int) -> Tensor:
    """Sample a projection (k, points) at another number of tokens: (k, length).

    Each slot keeps its total weight.
    """
    points = proj.shape[1]
    if points == length:
        return proj
    mode = "linear" if length > points else "area"
    sampled = F.interpolate(proj.unsqueeze(0), size=length, mode=mode)[0]
    return sampled * (points / length)


def token_means(proj_len: int, length: int) -> Tensor:
    """Means of consecutive tokens, (proj_len, length) in float64: how projections start."""
    return slot_means(proj_len, length, torch.device("cpu")).double() / length


# Shapes decide what is computed, which torch.fx cannot follow: it calls these as they are.
torch.fx.wrap("fit_length")
torch.fx.wrap("linformer_attention")
torch.fx.wrap("refuse_causal")


class LinformerAttention(HeadsAttention):
    """Multi-head Linformer attention on tokens (B, N, C).

    Until `set_layout` tells the number of tokens, the projection is a function on [0, 1] held at
    256 points and sampled at as many as come; from then on it fits that number only. Checkpoints of
    either kind load into either.

    Args:
        proj_len: k, the number of projected keys.
        one_kv_head: Use one key and value head for all query heads.
        share_kv: Use the keys as values, and E as F.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: ``proj_len`` below 1, or what `HeadsAttention` refuses.
    """

    mechanism = "linformer"
    needs_fixed_grid = True
    causal = False
    masks = "keys"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        proj_len: int = 64,
        one_kv_head: bool = False,
        share_kv: bool = False,
        **kwargs: Any,
    ) -> None:
        if proj_len < 1:
            raise ValueError(f"proj_len={proj_len} must be at least 1, e.g. 64.")
        super().__init__(dim, num_heads, **kwargs)
        self.proj_len = proj_len
        self.share_kv = share_kv
        self.kv_heads = 1 if one_kv_head else self.num_heads
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        kv_dim = self.kv_heads * self.head_dim
        # Widths of queries, keys and, if they are not the keys, values in the joint projection.
        self.parts = [self.attn_dim, kv_dim] + ([] if share_kv else [kv_dim])
        if one_kv_head or share_kv:
            self.qkv = nn.Linear(dim, sum(self.parts), bias=self.qkv.bias is not None, **dd)
        self.proj_k = nn.Parameter(torch.empty(proj_len, POINTS, **dd))
        self.proj_v = None if share_kv else nn.Parameter(torch.empty(proj_len, POINTS, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the projections to means of consecutive tokens."""
        means = token_means(self.proj_len, self.proj_k.shape[1])
        self.proj_k.copy_(means)
        if self.proj_v is not None:
            self.proj_v.copy_(means)

    def set_layout(
        self, grid_size: tuple[int, int], num_prefix_tokens: int, depth: int = 0
    ) -> None:
        """Fix the number of tokens; what was trained or loaded before is interpolated."""
        if (grid_size, num_prefix_tokens) == (self.grid_size, self.num_prefix_tokens):
            return
        length = num_prefix_tokens + grid_size[0] * grid_size[1]
        initial = self._is_initial()
        for name in ("proj_k", "proj_v"):
            old: Tensor | None = getattr(self, name)
            if old is None:
                continue
            with torch.no_grad():
                if self.grid_size is not None:
                    new = resample_projection(old, grid_size, self.grid_size, num_prefix_tokens)
                elif initial:
                    new = token_means(self.proj_len, length)
                else:
                    new = fit_length(old, length)
            self._set_projection(name, new)
        super().set_layout(grid_size, num_prefix_tokens, depth)

    def _is_initial(self) -> bool:
        """Whether nobody has trained or loaded the projections yet."""
        means = token_means(self.proj_len, self.proj_k.shape[1])
        both = (self.proj_k, self.proj_v)
        return all(p is None or p.is_meta or torch.equal(p, means.to(p)) for p in both)

    def _set_projection(self, name: str, value: Tensor) -> None:
        old: nn.Parameter = getattr(self, name)
        value = value.to(device=old.device, dtype=old.dtype)
        setattr(self, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("proj_k", "proj_v"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is None or own is None or given.shape == own.shape:
                continue
            if given.shape[0] != own.shape[0]:
                continue  # another proj_len, which fails as usual
            if self.grid_size is None:  # take the length that comes
                self._set_projection(name, torch.empty_like(given, device=own.device))
            elif given.shape[1] == POINTS:  # a function, sampled as it would be in each forward
                state_dict[prefix + name] = fit_length(given, own.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) to queries (B, H, N, D), keys and values (B, H or 1, N, D)."""
        B, N, _ = x.shape
        heads = self.qkv(x).split(self.parts, dim=-1)
        q = heads[0].reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        k = heads[1].reshape(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.share_kv:
            return q, k, k
        v = heads[2].reshape(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        return q, k, v

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Linformer attention per head, (B, H, N, D)."""
        refuse_causal(is_causal, "linformer")
        proj_k: Tensor = self.proj_k
        proj_v: Tensor | None = self.proj_v
        if self.grid_size is None:
            proj_k = fit_length(proj_k, k.shape[-2])
            proj_v = None if proj_v is None else fit_length(proj_v, k.shape[-2])
        dropout_p = self.attn_drop.p if self.training else 0.0
        return linformer_attention(
            q,
            k,
            v,
            proj_k,
            proj_k if proj_v is None else proj_v,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
        )

    def extra_repr(self) -> str:
        """Projected length, for printing."""
        return f"proj_len={self.proj_len}, kv_heads={self.kv_heads}, share_kv={self.share_kv}"
