"""Masks for mechanisms that never form the (N, N) map: one row over the keys for all queries."""

import torch
from torch import Tensor

__all__ = ["key_bias", "key_padding", "refuse_causal"]


def key_padding(attn_mask: Tensor | None, mechanism: str) -> Tensor | None:
    """Read timm's ``attn_mask`` as a mask over keys: True where a key may be attended.

    Args:
        attn_mask: None, or broadcastable to (B, H, N, S) with one row for all queries, that is
            (B, 1, 1, S): bool (True = attend) or additive float (0 = attend, -inf = never).
        mechanism: Name for the message.

    Returns:
        None or bool (..., S, 1), aligned with keys (B, H, S, D).

    Raises:
        ValueError: The mask differs between queries.
    """
    if attn_mask is None:
        return None
    if attn_mask.dim() < 2 or attn_mask.shape[-2] != 1:
        raise ValueError(
            f"{mechanism} attention never forms the (N, N) map, so it cannot apply an attn_mask of "
            f"shape {list(attn_mask.shape)}; pass one row for all queries, (B, 1, 1, N)."
        )
    if attn_mask.dtype == torch.bool:
        keep = attn_mask
    else:  # "never" is -inf or the type's lowest number; float16 ends at -65504
        keep = attn_mask > (-3e4 if attn_mask.dtype == torch.float16 else -1e38)
    return keep.transpose(-2, -1)


def key_bias(attn_mask: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive form of a mask over keys.

    Args:
        attn_mask: As in `key_padding`, bool or additive.
        keep: What `key_padding` made of it, (..., S, 1).
        dtype: Floating type of the result.

    Returns:
        (..., S, 1): the mask's own finite values, -inf where a key is left out.
    """
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    if attn_mask.dtype != torch.bool:
        bias = attn_mask.transpose(-2, -1).to(dtype)
    return bias.masked_fill(~keep, float("-inf"))


def refuse_causal(is_causal: bool, mechanism: str) -> None:
    """Raise where a mechanism mixes all tokens at once and cannot hide the future."""
    if is_causal:
        raise ValueError(
            f"{mechanism} attention sees every token, so is_causal=True cannot be honoured; "
            "use softmax, performer or local1d attention."
        )
