"""Depthwise convolution of the values on the token grid: the option ``dwc`` of every mechanism.

Linear attention mixes all tokens alike and loses what is near; the usual cure adds the values of
the 3 x 3 tokens around each one, one filter per channel: Han et al., "FLatten Transformer", 2023
(arXiv:2308.00442) and "Agent Attention", 2023 (arXiv:2312.08874), both "+ DWC(V)". Time: 9 * N * C.

Departures from the papers' code: the filters start at zero, so that adding them changes nothing,
and have no bias; prefix tokens (class, registers) are neither convolved nor seen.
"""

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.layout import check_grid
from timm_xformers.layers.masks import clear_left_out

__all__ = ["GridConv", "convolve_tokens", "grid_convolution", "values_to_convolve"]


def convolve_tokens(x: Tensor, weight: Tensor, num_cols: int) -> Tensor:
    """Depthwise convolution of a grid of tokens, padded with zeros.

    Args:
        x: Tokens (B, N, C) in raster order.
        weight: Filters (C, 1, rows, columns), both odd.
        num_cols: Columns of the grid; 1 makes tokens in a row a column.

    Returns:
        (B, N, C).
    """
    # Tokens of a joint projection lie with their channels side by side, so this view is
    # channels-last, six times faster to convolve than maps.
    x = torch.unflatten(x.transpose(1, 2), 2, [-1, num_cols])  # (B, C, rows, columns)
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    x = F.conv2d(x, weight.to(x.dtype), padding=padding, groups=weight.shape[0])
    return x.flatten(2).transpose(1, 2)


def grid_convolution(
    x: Tensor, weight: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """`convolve_tokens` behind the prefix, which gets zeros.

    Args:
        x: Tokens (B, N, C), N = num_prefix_tokens + rows * columns, in raster order.
        weight: Filters (C, 1, 3, 3).
        grid_size: Rows and columns.
        num_prefix_tokens: Tokens before the grid.

    Returns:
        (B, N, C).

    Raises:
        ValueError: N does not fit the grid.
    """
    check_grid(x.shape[1], grid_size, num_prefix_tokens)
    near = convolve_tokens(x[:, num_prefix_tokens:], weight, grid_size[1])
    return near if num_prefix_tokens == 0 else F.pad(near, [0, 0, num_prefix_tokens, 0])


def values_to_convolve(
    v: Tensor, attn_mask: Tensor | None, is_causal: bool, num_heads: int
) -> Tensor:
    """Values as one row of channels per token, zero where a mask over keys leaves a token out.

    Args:
        v: Values (B, H or 1, N, D).
        attn_mask: None, or (B, 1, 1, N): bool (True = attend) or an additive bias per key.
        is_causal: Refused: a filter sees tokens on all sides.
        num_heads: H.

    Returns:
        (B, N, H * D).

    Raises:
        ValueError: ``is_causal``, or a mask that differs between queries.
    """
    if is_causal:
        raise ValueError(
            "The convolution of the values (dwc) sees tokens on all sides, so is_causal=True "
            "cannot be honoured; use dwc=False."
        )
    if attn_mask is not None and (attn_mask.dim() < 2 or attn_mask.shape[-2] != 1):
        raise ValueError(
            "The convolution of the values (dwc) serves all queries alike, so it cannot apply an "
            f"attn_mask of shape {list(attn_mask.shape)}; pass one row for all queries, "
            "(B, 1, 1, N) (timm's NaFlexViT does so when built with use_key_only_attn_mask=True), "
            "or use dwc=False."
        )
    kept = clear_left_out(v, attn_mask, "dwc").expand(-1, num_heads, -1, -1)
    return kept.transpose(1, 2).flatten(2)


class GridConv(nn.Module):
    """3 x 3 depthwise convolution of tokens (B, N, C) on their grid, zero at the start."""

    def __init__(
        self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the filters to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """See `grid_convolution`."""
        return grid_convolution(x, self.weight, grid_size, num_prefix_tokens)


# Sizes decide what is computed, which torch.fx cannot follow: it calls this as it is.
torch.fx.wrap("grid_convolution")
