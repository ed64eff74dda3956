"""FNet mixing: a Fourier transform in place of attention.

Lee-Thorp et al., "FNet", 2021 (arXiv:2105.03824), eq. 3: the real part of a 2-D discrete Fourier
transform over tokens and channels. Time grows as N * log N * C; there are no parameters.

Departure: the transform is orthonormal. The paper normalises after mixing, timm's blocks before,
where the plain sum over N * C elements would swamp the residual stream.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

__all__ = ["FNetMixing", "fnet_mixing"]


def fnet_mixing(x: Tensor) -> Tensor:
    """Real part of the orthonormal 2-D Fourier transform over tokens and channels.

    Args:
        x: Tokens (B, N, C).

    Returns:
        (B, N, C) in the type of ``x``; half precision is transformed in float32.
    """
    if x.numel() == 0:  # MKL has no transform of nothing
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # One axis at a time: torch 2.5 cannot export fft2.
    channels: Tensor = torch.fft.fft(wide, dim=-1, norm="ortho")
    mixed: Tensor = torch.fft.fft(channels, dim=-2, norm="ortho").real
    return mixed.to(x.dtype)


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise where tokens are to be hidden: a Fourier transform reaches every one."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "fnet mixes every token with every other and cannot apply attn_mask or is_causal; "
            "use another mechanism."
        )


# Their control flow is none of the graph's business: torch.fx calls them as they are.
torch.fx.wrap("fnet_mixing")
torch.fx.wrap("refuse_masks")


class FNetMixing(nn.Module):
    """FNet mixing of tokens (B, N, C) in timm's attention slot.

    Args:
        dim: Token width C. Arguments that are not named here are the slot's and have no effect, as
            this one: the transform has no heads, projections, norms or parameters.
        dim_out: Must be ``dim`` or None: there is no projection to another width.
        gated: Must be False; there is no attention output to gate.
        attn_drop: Must be 0; there is no attention map.
        proj_drop: Dropout probability after mixing.
        dwc: Must be False; there are no values to convolve.

    Raises:
        ValueError: ``dim_out``, ``gated``, ``attn_drop`` or ``dwc`` asks for what fnet has not.
    """

    mechanism = "fnet"
    needs_fixed_grid = False
    causal = False
    masks = "none"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dwc: bool = False,
    ) -> None:
        super().__init__()
        if dwc:
            raise ValueError(
                "fnet mixes tokens without values of their own, so dwc=True has nothing to "
                "convolve; use another mechanism."
            )
        if attn_drop > 0:
            raise ValueError(
                f"fnet has no map to drop entries of, so attn_drop={attn_drop} cannot be honoured; "
                "use proj_drop."
            )
        if gated or dim_out not in (None, dim):
            raise ValueError(
                "fnet has no projections, so gated=True and another dim_out cannot be honoured; "
                "leave them out."
            )
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens (B, N, C) to (B, N, C).

        Raises:
            ValueError: A mask is given; a Fourier transform reaches every token.
        """
        refuse_masks(attn_mask, is_causal)
        out: Tensor = self.proj_drop(fnet_mixing(x))
        return out

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prefix + "qkv.weight" in state_dict:
            error_msgs.append(
                f"{prefix.rstrip('.')} is fnet, which has no projections to load attention weights "
                "into; create the model with pretrained=False."
            )
            for name in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[name]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
