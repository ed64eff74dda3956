"""Windows of a token grid: as lists of token numbers, and as reshaped maps.

The local mechanisms number tokens; the flattened sequence is a grid of one row. Nothing is padded
or rolled there: a window at the border is a smaller one, and one that a shift cuts in two is two,
so that a call without a mask of its own needs none. Swin's blocks, whose maps have a bias anyway,
reshape and mask.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["list_windows", "merge", "partition", "pick_pairs", "take", "window_mask"]


def _cut_side(
    length: int, window: int, shift: int, neighbours: bool, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Windows along one side: runs of like ones, as numbers of rows of queries and of keys.

    What lies before the first whole window and behind the last one is a window of its own.
    """
    # A shift of a window that covers the side would only tear it apart.
    cuts = [0] if shift == 0 or window >= length else [0, shift]
    while cuts[-1] + window < length:
        cuts.append(cuts[-1] + window)
    cuts.append(length)
    count, reach = len(cuts) - 1, 1 if neighbours else 0
    runs: list[tuple[int, int, int, int, int]] = []  # count, first query and number, same of keys
    for i in range(count):
        start, end = cuts[i], cuts[i + 1]
        first, last = cuts[max(i - reach, 0)], cuts[min(i + 1 + reach, count)]
        if len(runs) > 0:
            many, run_start, size, run_first, num_keys = runs[-1]
            alike = size == end - start and num_keys == last - first
            if alike and run_start - run_first == start - first:
                runs[-1] = (many + 1, run_start, size, run_first, num_keys)
                continue
        runs.append((1, start, end - start, first, last - first))
    sides: list[tuple[Tensor, Tensor]] = []
    for many, start, size, first, num_keys in runs:
        steps = torch.arange(many, device=device).unsqueeze(1) * size
        queries = start + steps + torch.arange(size, device=device)
        sides.append((queries, first + steps + torch.arange(num_keys, device=device)))
    return sides


def list_windows(
    grid_size: tuple[int, int],
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    neighbours: bool,
    num_prefix_tokens: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the tokens that ask and of those that answer, window by window.

    Windows of one size with equally many keys are together. There is no padding: a window at the
    border has fewer keys, and what does not fill one makes a smaller one.

    Args:
        grid_size: Rows and columns of the grid.
        window_size: Rows and columns of a window.
        shift_size: Rows and columns by which windows are moved.
        neighbours: Add the keys of the windows around.
        num_prefix_tokens: P, the tokens before the grid, which are keys of every window.
        device: Where to number.

    Returns:
        Pairs of (n, w) and (n, K); all first members together hold each token of the grid once.
    """
    P = num_prefix_tokens
    before = torch.arange(P, device=device).unsqueeze(0)
    all_rows = _cut_side(grid_size[0], window_size[0], shift_size[0], neighbours, device)
    all_cols = _cut_side(grid_size[1], window_size[1], shift_size[1], neighbours, device)
    windows: list[tuple[Tensor, Tensor]] = []
    for q_rows, k_rows in all_rows:
        for q_cols, k_cols in all_cols:
            q_ids = _cross(q_rows, q_cols, grid_size[1]) + P
            k_ids = _cross(k_rows, k_cols, grid_size[1]) + P
            k_ids = torch.cat([before.expand(k_ids.shape[0], -1), k_ids], dim=1)
            new = True
            for i in range(len(windows)):
                qs, ks = windows[i]
                if qs.shape[1] == q_ids.shape[1] and ks.shape[1] == k_ids.shape[1]:
                    windows[i] = (torch.cat([qs, q_ids]), torch.cat([ks, k_ids]))
                    new = False
            if new:
                windows.append((q_ids, k_ids))
    return windows


def _cross(rows: Tensor, cols: Tensor, num_cols: int) -> Tensor:
    """Rows (a, h) and columns (b, w) of windows to token numbers (a * b, h * w)."""
    ids = rows[:, None, :, None] * num_cols + cols[None, :, None, :]
    return ids.reshape(-1, rows.shape[1] * cols.shape[1])


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens (B, N, ...) by their numbers (n, w): (B * n, w, ...)."""
    return torch.unflatten(x.index_select(1, ids.flatten()), 1, ids.shape).flatten(0, 1)


def pick_pairs(
    attn_mask: Tensor | None, is_causal: bool, q_ids: Tensor, k_ids: Tensor
) -> Tensor | None:
    """What a mask over all tokens says about windows.

    Args:
        attn_mask: None, or broadcastable to (B, H, N, N).
        is_causal: Hide later tokens; overrides ``attn_mask``.
        q_ids: Numbers of tokens that ask, (n, w).
        k_ids: Numbers of those that answer, (n, K).

    Returns:
        None, or (1 or B, 1 or H, n, 1 or w, K).
    """
    if is_causal:
        return (k_ids.unsqueeze(1) <= q_ids.unsqueeze(2))[None, None]
    if attn_mask is None:
        return None
    while attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    if attn_mask.shape[-2] == 1:
        return attn_mask[:, :, 0][:, :, k_ids].unsqueeze(3)
    return attn_mask[:, :, q_ids.unsqueeze(2), k_ids.unsqueeze(1)]


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
