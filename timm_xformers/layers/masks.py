"""Masks for mechanisms that never form the (N, N) map: one row over the keys for all queries."""

import torch
from torch import Tensor

__all__ = [
    "check_kind",
    "clear_left_out",
    "kept_keys",
    "key_bias",
    "key_padding",
    "refuse_causal",
    "relative_bias",
]


def check_kind(attn_mask: Tensor) -> None:
    """Raise where a mask is neither bool nor floating point, so that nobody knows what it means."""
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(
            f"attn_mask is {attn_mask.dtype}; pass bool (True = attend) or floating point (added "
            "to the scores), e.g. attn_mask.bool()."
        )


def key_padding(attn_mask: Tensor | None, mechanism: str) -> Tensor | None:
    """Read timm's ``attn_mask`` as a mask over keys: True where a key may be attended.

    Args:
        attn_mask: None, or broadcastable to (B, H, N, S) with one row for all queries, that is
            (B, 1, 1, S): bool (True = attend) or additive float (0 = attend, -inf = never).
        mechanism: Name for the message.

    Returns:
        None or bool (..., S, 1), aligned with keys (B, H, S, D).

    Raises:
        ValueError: The mask differs between queries, or is neither bool nor floating point.
    """
    if attn_mask is None:
        return None
    check_kind(attn_mask)
    if attn_mask.dim() < 2 or attn_mask.shape[-2] != 1:
        raise ValueError(
            f"{mechanism} attention never forms the (N, N) map, so it cannot apply an attn_mask of "
            f"shape {list(attn_mask.shape)}; pass one row for all queries, (B, 1, 1, N) (timm's "
            "NaFlexViT does so when built with use_key_only_attn_mask=True)."
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


def relative_bias(attn_mask: Tensor | None, mechanism: str, dtype: torch.dtype) -> Tensor | None:
    """A mask over keys as a bias whose highest value per row is 0.

    Softmax does not change when all its scores are moved, so only differences count.

    Args:
        attn_mask: As in `key_padding`, bool or additive.
        mechanism: Name for the message.
        dtype: Floating type of the result.

    Returns:
        None or (..., S, 1): -inf where a key is left out or lies 80 below the highest.

    Raises:
        ValueError: As `key_padding`.
    """
    keep = key_padding(attn_mask, mechanism)
    if attn_mask is None or keep is None:
        return None
    bias = key_bias(attn_mask, keep, dtype)
    if attn_mask.dtype == torch.bool or bias.numel() == 0:
        return bias
    top = bias.amax(dim=-2, keepdim=True)
    bias = bias - top.masked_fill(top == float("-inf"), 0.0)
    # e^-80 is nothing beside 1, so this is what the usual words for "never" mean: -100, -1e4, -1e9
    # and a type's lowest number. (A literal: TorchScript reads no global number.)
    return bias.masked_fill(bias <= -80.0, float("-inf"))


def kept_keys(attn_mask: Tensor | None, mechanism: str) -> Tensor | None:
    """A mask over keys for a mechanism that can leave keys out, but not weigh them.

    Arguments and result are those of `key_padding`.

    Raises:
        ValueError: As `key_padding`, or keys that are kept differ in their bias. In a compiled or
            exported model the latter is an assertion on the device.
    """
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return key_padding(attn_mask, mechanism)
    bias = relative_bias(attn_mask, mechanism, torch.float32)
    assert bias is not None  # for TorchScript; the mask is there
    kept = bias > float("-inf")
    uneven = (kept & (bias < 0)).any()
    message = (
        f"{mechanism} attention joins keys before it compares them with queries, so it can leave "
        "keys out, but not weigh them: an additive attn_mask may hold one value for all keys that "
        "count and one at least 80 lower for the others; use nystrom, performer or softmax "
        "attention for other biases."
    )
    if torch.jit.is_scripting():
        if bool(uneven):
            raise ValueError(message)
    elif torch.compiler.is_compiling():
        torch._assert_async(~uneven, message)
    elif bool(uneven):
        raise ValueError(message)
    return kept


def clear_left_out(x: Tensor, attn_mask: Tensor | None, mechanism: str) -> Tensor:
    """Keys or values (B, H, S, D) with zeros where a mask over keys leaves them out."""
    bias = relative_bias(attn_mask, mechanism, torch.float32)
    return x if bias is None else x * (bias > float("-inf")).to(x.dtype)


def refuse_causal(is_causal: bool, mechanism: str) -> None:
    """Raise where a mechanism mixes all tokens at once and cannot hide the future."""
    if is_causal:
        raise ValueError(
            f"{mechanism} attention sees every token, so is_causal=True cannot be honoured; "
            "use softmax, performer or local1d attention."
        )
