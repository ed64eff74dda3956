"""Windows of a token map: cutting, putting together, neighbours, and who may see whom.

Shared by the local mechanisms; the flattened sequence is a map of one row. Padding and tokens that
a shift brings together from opposite borders are masked, never attended.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cut_windows", "join_attn_mask", "merge", "partition", "window_mask", "with_neighbours"]


def partition(
    x: Tensor, window_size: tuple[int, int], shift_size: tuple[int, int], fill: float
) -> Tensor:
    """Cut a map (A, rows, cols, F) into windows (A, rows / wh, cols / ww, wh * ww, F).

    The map is filled up at the end, then rolled back by ``shift_size``.
    """
    wh, ww = window_size
    pad_h, pad_w = -x.shape[1] % wh, -x.shape[2] % ww
    if pad_h + pad_w > 0:
        x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h], value=fill)
    if shift_size[0] + shift_size[1] > 0:
        x = x.roll([-shift_size[0], -shift_size[1]], [1, 2])
    A, rows, cols, width = x.shape
    x = x.reshape(A, rows // wh, wh, cols // ww, ww, width).transpose(2, 3)
    return x.reshape(A, rows // wh, cols // ww, wh * ww, width)


def merge(
    x: Tensor, grid_size: tuple[int, int], window_size: tuple[int, int], shift_size: tuple[int, int]
) -> Tensor:
    """Undo `partition`: (A, rows / wh, cols / ww, wh * ww, F) to (A, rows, cols, F)."""
    wh, ww = window_size
    A, nh, nw, _, width = x.shape
    x = x.reshape(A, nh, nw, wh, ww, width).transpose(2, 3).reshape(A, nh * wh, nw * ww, width)
    if shift_size[0] + shift_size[1] > 0:
        x = x.roll([shift_size[0], shift_size[1]], [1, 2])
    return x[:, : grid_size[0], : grid_size[1]]


def with_neighbours(x: Tensor, fill: float) -> Tensor:
    """Append to each window those around it: (A, nh, nw, w, F) to (A, nh, nw, up to 9 w, F)."""
    _, nh, nw, _, _ = x.shape
    ring_h, ring_w = min(nh - 1, 1), min(nw - 1, 1)
    x = F.pad(x, [0, 0, 0, 0, ring_w, ring_w, ring_h, ring_h], value=fill)
    parts: list[Tensor] = []
    for i in range(2 * ring_h + 1):
        for j in range(2 * ring_w + 1):
            parts.append(x[:, i : i + nh, j : j + nw])
    return torch.cat(parts, dim=3)


def cut_windows(
    x: Tensor,
    grid_size: tuple[int, int],
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    num_prefix_tokens: int,
    with_prefix: bool,
    neighbours: bool,
) -> Tensor:
    """Tokens (B, H, N, F) to windows (B * nW, H, keys, F), prefix tokens first if asked for."""
    B, H, _, width = x.shape
    grid = x[:, :, num_prefix_tokens:].reshape(B * H, grid_size[0], grid_size[1], width)
    w = partition(grid, window_size, shift_size, 0.0)
    if neighbours:
        w = with_neighbours(w, 0.0)
    w = w.reshape(B, H, -1, w.shape[3], width)  # (B, H, nW, keys, F)
    if with_prefix and num_prefix_tokens > 0:
        prefix = x[:, :, None, :num_prefix_tokens].expand(-1, -1, w.shape[2], -1, -1)
        w = torch.cat([prefix, w], dim=3)
    return w.transpose(1, 2).reshape(-1, H, w.shape[3], width)


def window_mask(
    q_ids: Tensor,
    k_ids: Tensor,
    grid_cols: int,
    num_prefix_tokens: int,
    window_size: tuple[int, int],
    shifted: bool,
    is_causal: bool,
) -> Tensor:
    """Who may attend to whom inside the windows, from token numbers (-1 = padding).

    Args:
        q_ids: (nW, w).
        k_ids: (nW, K), prefix tokens included.
        grid_cols: Tokens in a row of the grid.
        num_prefix_tokens: Tokens before the grid.
        window_size: Rows and columns of a window.
        shifted: Hide pairs that the roll brought together from opposite borders.
        is_causal: Hide later tokens.

    Returns:
        Bool (nW, 1 or w, K).
    """
    mask = (k_ids >= 0).unsqueeze(1)
    if shifted:
        q_grid = (q_ids - num_prefix_tokens).unsqueeze(2)
        k_grid = (k_ids - num_prefix_tokens).unsqueeze(1)
        rows = q_grid.div(grid_cols, rounding_mode="floor") - k_grid.div(
            grid_cols, rounding_mode="floor"
        )
        cols = q_grid.remainder(grid_cols) - k_grid.remainder(grid_cols)
        near = (rows.abs() < window_size[0]) & (cols.abs() < window_size[1])
        mask = mask & (near | (k_ids < num_prefix_tokens).unsqueeze(1))
    if is_causal:
        mask = mask & (k_ids.unsqueeze(1) <= q_ids.unsqueeze(2))
    return mask


def join_attn_mask(mask: Tensor, attn_mask: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
    """Join a mask over all tokens with the windows' own: (B, 1 or H, nW, 1 or w, K)."""
    while attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    columns = k_ids.clamp_min(0)
    if attn_mask.shape[-2] == 1:
        picked = attn_mask[:, :, 0][:, :, columns].unsqueeze(3)  # (B, h, nW, 1, K)
    else:
        picked = attn_mask[:, :, q_ids.clamp_min(0).unsqueeze(2), columns.unsqueeze(1)]
    if picked.dtype == torch.bool:
        return picked & mask
    return picked.masked_fill(~mask, float("-inf"))
