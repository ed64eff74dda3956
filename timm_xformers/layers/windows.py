"""Windows of a token grid: as maps cut into blocks, and as rolled maps.

The local mechanisms cut; the flattened sequence is a grid of one row. Nothing is padded or rolled
there: a window at the border is a smaller one, and one that a shift cuts in two is two, so that a
call without a mask of its own needs none. Swin's blocks, whose maps have a bias anyway, pad, roll
and mask.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Run", "as_tokens", "cut_map", "cut_side", "join_map", "merge", "partition"]
__all__ += ["pick_pairs", "pieces", "side_by_side", "take", "window_mask"]

# Like windows in a row along one side: how many, start and length of the first one's queries, start
# and length of its keys. Each of the others lies one length of queries further on.
Run = tuple[int, int, int, int, int]


def cut_side(length: int, window: int, shift: int, neighbours: bool) -> list[Run]:
    """Windows along one side.

    What lies before the first whole window and behind the last one is a window of its own.

    Args:
        length: Tokens along the side.
        window: Those of a window.
        shift: By how many windows are moved.
        neighbours: Give a window the keys of the one before and the one behind.

    Returns:
        Runs of like windows; together their queries are the side, in order.
    """
    # A shift of a window that covers the side would only tear it apart.
    cuts = [0] if shift == 0 or window >= length else [0, shift]
    while cuts[-1] + window < length:
        cuts.append(cuts[-1] + window)
    cuts.append(length)
    count, reach = len(cuts) - 1, 1 if neighbours else 0
    runs: list[Run] = []
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
    return runs


def _cut(x: Tensor, axis: int, runs: list[Run], keys: bool) -> list[Tensor]:
    """One axis of a map to (windows, tokens), one tensor per run."""
    parts: list[Tensor] = []
    if keys:
        for many, _, size, first, num_keys in runs:
            steps = torch.arange(many, device=x.device).unsqueeze(1) * size + first
            places = (steps + torch.arange(num_keys, device=x.device)).flatten()
            parts.append(torch.unflatten(x.index_select(axis, places), axis, [many, num_keys]))
        return parts
    # The gradient of a split is one copy, that of slices a sum of whole maps.
    sides = [many * size for many, _, size, _, _ in runs]
    whole = [x] if len(runs) == 1 else x.split_with_sizes(sides, axis)
    for i, part in enumerate(whole):
        parts.append(torch.unflatten(part, axis, [runs[i][0], runs[i][2]]))
    return parts


def _blocks(x: Tensor, rows: list[Run], cols: list[Run], keys: bool) -> list[Tensor]:
    """A map as (B, windows down, windows across, wh, ww, H, D), one tensor per pair of runs."""
    blocks: list[Tensor] = []
    for band in _cut(x, 1, rows, keys):
        for block in _cut(band, 3, cols, keys):
            blocks.append(block.transpose(2, 3))
    return blocks


def as_tokens(block: Tensor) -> Tensor:
    """Windows (..., wh, ww, H, D) as (windows, H, wh * ww, D)."""
    wh, ww, H, D = block.shape[-4], block.shape[-3], block.shape[-2], block.shape[-1]
    # A token's heads lie side by side in a joint projection: one piece to copy.
    return block.reshape(-1, wh * ww, H, D).transpose(1, 2)


def cut_map(x: Tensor, rows: list[Run], cols: list[Run], keys: bool) -> list[Tensor]:
    """Cut a map into windows.

    Args:
        x: (B, rows, columns, H, D).
        rows: Runs of windows from top to bottom, of `cut_side`.
        cols: Runs from left to right.
        keys: Take each window's keys, else its queries.

    Returns:
        One tensor (B * windows, H, tokens, D) per pair of runs, row by row.
    """
    return [as_tokens(block) for block in _blocks(x, rows, cols, keys)]


def join_map(parts: list[Tensor], rows: list[Run], cols: list[Run]) -> Tensor:
    """Undo `cut_map` for queries.

    Args:
        parts: (B * windows, H, tokens, D) per pair of runs.
        rows: As in `cut_map`.
        cols: As in `cut_map`.

    Returns:
        (B, rows, columns, H, D).
    """
    bands: list[Tensor] = []
    for i, (nh, _, wh, _, _) in enumerate(rows):
        blocks: list[Tensor] = []
        for j, (nw, _, ww, _, _) in enumerate(cols):
            part = parts[i * len(cols) + j].transpose(1, 2)
            H, D = part.shape[2], part.shape[3]
            block = part.reshape(-1, nh, nw, wh, ww, H, D).transpose(2, 3)
            blocks.append(block.reshape(-1, nh * wh, nw * ww, H, D))
        bands.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2))
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)


def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Queries, keys and values (B, 3 * H, N, D) without a copy, where one projection holds them.

    Cut together, a row of a window is one piece of memory. On a CPU, in eager mode and without
    gradients; elsewhere None.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return None
    if torch.is_grad_enabled() or type(q) is not Tensor or q.device.type != "cpu":
        return None
    (B, H, N, D), strides, width = q.shape, q.stride(), q.shape[1] * q.shape[3]
    # Of two tokens and more, the second begins behind the first one's keys and values: whatever
    # lies at those addresses is in the same memory.
    if N < 2 or strides != (N * 3 * width, D, 3 * width, 1):
        return None
    if {(x.shape, x.stride(), x.dtype) for x in (k, v)} != {(q.shape, strides, q.dtype)}:
        return None
    try:
        start, *others = (x.data_ptr() for x in (q, k, v))
    except RuntimeError:  # within torch.func a tensor has no memory of its own
        return None
    step = width * q.element_size()
    if others != [start + step, start + 2 * step]:
        return None
    return q.as_strided((B, 3 * H, N, D), strides)


def pieces(x: Tensor, rows: list[Run], cols: list[Run], num_tokens: int) -> list[Tensor]:
    """Cut a map (B, rows, columns, H, D) into windows, a few at a time and without a copy.

    Returns:
        Views (b, down, across, wh, ww, H, D) of at most ``num_tokens`` tokens, or of one window.
    """
    found: list[Tensor] = []
    for block in _blocks(x, rows, cols, False):
        B, nh, nw, wh, ww = block.shape[:5]
        across = max(1, num_tokens // (wh * ww))
        down = max(1, across // nw)
        images = max(1, down // nh)
        for b in range(0, B, images):
            for i in range(0, nh, down):
                for j in range(0, nw, across):
                    found.append(block[b : b + images, i : i + down, j : j + across])
    return found


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens (B, H, N, D) by their numbers (n, w): (B * n, H, w, D)."""
    H, D = x.shape[1], x.shape[3]
    taken = x.transpose(1, 2).index_select(1, ids.flatten())
    return taken.reshape(-1, ids.shape[1], H, D).transpose(1, 2)


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


def window_mask(ids: Tensor, grid_cols: int, window_size: tuple[int, int], shifted: bool) -> Tensor:
    """Who may attend to whom inside the windows, from token numbers (-1 = padding).

    Args:
        ids: (nW, w).
        grid_cols: Tokens in a row of the grid.
        window_size: Rows and columns of a window.
        shifted: Hide pairs that the roll brought together from opposite borders.

    Returns:
        Bool (nW, 1 or w, w).
    """
    mask = (ids >= 0).unsqueeze(1)
    if shifted:
        row, col = ids.div(grid_cols, rounding_mode="floor"), ids.remainder(grid_cols)
        rows = row.unsqueeze(2) - row.unsqueeze(1)
        cols = col.unsqueeze(2) - col.unsqueeze(1)
        mask = mask & (rows.abs() < window_size[0]) & (cols.abs() < window_size[1])
    return mask
