"""Local attention: windows of the flattened sequence (1-D) or of the token grid (2-D).

1-D windows with neighbours: Roy et al., 2021 (arXiv:2003.05997), section 3; Beltagy et al., 2020
(arXiv:2004.05150). 2-D windows and their shift: Liu et al., "Swin Transformer", 2021
(arXiv:2103.14030), section 3.2. Per head, time grows as N * w * D, w being the keys of a window:
with neighbours 3 windows in 1-D and 9 in 2-D, else 1.

Both are one function here: the flattened sequence is a grid of one row. Prefix tokens (class,
registers) stand outside the grid: they attend to every token and every window attends to them.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.heads import HeadsAttention, attend, is_open
from timm_xformers.layers.layout import check_grid
from timm_xformers.layers.windows import (
    Run,
    as_tokens,
    cut_map,
    cut_side,
    join_map,
    pick_pairs,
    pieces,
    side_by_side,
    take,
)

__all__ = ["Local1dAttention", "Local2dAttention", "local_attention"]

# Numbers of queries, keys and values cut at once for each thread: eight windows of 8 x 8 tokens in
# four heads of 32. Half as many are about as fast; all at once is slower.
PIECE = 3 << 16


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_size: tuple[int, int],
    window_size: tuple[int, int],
    neighbours: bool = True,
    shift_size: tuple[int, int] = (0, 0),
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Mix tokens with softmax attention inside windows of a grid.

    Args:
        q: Queries (B, H, N, D), N = num_prefix_tokens + rows * columns, in raster order.
        k: Keys (B, H, N, D).
        v: Values (B, H, N, E).
        grid_size: Rows and columns; (1, N) makes windows of the flattened sequence.
        window_size: Rows and columns of a window. One that covers the grid is exact attention.
        neighbours: Let a window attend to those around it too.
        shift_size: Move the windows by so many rows and columns (without ``neighbours``).
        num_prefix_tokens: Tokens before the grid, which attend and are attended globally.
        attn_mask: Bool (True = attend) or additive, broadcastable to (B, H, N, N).
        is_causal: Let a token see itself and earlier ones only, in raster order; overrides
            ``attn_mask``.
        dropout_p: Dropout probability on the maps.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: N does not fit the grid, or both ``neighbours`` and ``shift_size`` are set.
    """
    rows, cols = grid_size
    B, H, N, _ = q.shape
    P = num_prefix_tokens
    shifted = shift_size[0] + shift_size[1] > 0
    check_grid(N, grid_size, P)
    if neighbours and shifted:
        raise ValueError("Windows see their neighbours or are shifted, not both; drop one.")
    if is_causal:
        attn_mask = None
    reach = 2 if neighbours else 1
    if reach * window_size[0] >= rows and reach * window_size[1] >= cols:
        return attend(q, k, v, attn_mask, dropout_p, is_causal)

    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript compiles what follows "and")
        if rows == 1 and is_open(cols):
            window, shift = window_size[1], shift_size[1]
            x = _free_row(q, k, v, window, shift, neighbours, P, attn_mask, is_causal, dropout_p)
            return _with_prefix(x, q, k, v, P, attn_mask, is_causal, dropout_p)
    row_runs = cut_side(rows, window_size[0], shift_size[0], neighbours)
    col_runs = cut_side(cols, window_size[1], shift_size[1], neighbours)
    shared = neighbours or P > 0  # a key belongs to several windows
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not (shared or is_causal or attn_mask is not None):
            joint = side_by_side(q, k, v)
            if joint is not None:
                x = _in_pieces(_grid(joint, 0, grid_size), row_runs, col_runs, dropout_p)
                return x.flatten(1, 2).transpose(1, 2)
    qs = cut_map(_grid(q, P, grid_size), row_runs, col_runs, False)
    ks: list[Tensor] = []
    vs: list[Tensor] = []
    q_ids: list[Tensor] = []
    k_ids: list[Tensor] = []
    if not shared:
        ks = cut_map(_grid(k, 0, grid_size), row_runs, col_runs, False)
        vs = cut_map(_grid(v, 0, grid_size), row_runs, col_runs, False)
    if shared or is_causal or attn_mask is not None:  # numbers of tokens, cut as tokens are
        ids = torch.arange(N, device=q.device)
        cells = ids[P:].reshape(1, rows, cols, 1, 1)
        q_ids = [part[:, 0, :, 0] for part in cut_map(cells, row_runs, col_runs, False)]
        for part in cut_map(cells, row_runs, col_runs, neighbours):
            k_ids.append(torch.cat([ids[:P].expand(part.shape[0], -1), part[:, 0, :, 0]], dim=1))
    for i in range(len(qs)):
        mask: Tensor | None = None
        if len(q_ids) > 0:
            mask = pick_pairs(attn_mask, is_causal, q_ids[i], k_ids[i])
            if mask is not None:
                mask = mask.expand(B, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)
        keys = take(k, k_ids[i]) if shared else ks[i]
        values = take(v, k_ids[i]) if shared else vs[i]
        qs[i] = attend(qs[i], keys, values, mask, dropout_p)
    x = join_map(qs, row_runs, col_runs).reshape(-1, N - P, H, v.shape[-1]).transpose(1, 2)
    return _with_prefix(x, q, k, v, P, attn_mask, is_causal, dropout_p)


@torch.jit.unused
def _in_pieces(joint: Tensor, rows: list[Run], cols: list[Run], dropout_p: float) -> Tensor:
    """Queries, keys and values (B, rows, columns, 3 * H, D) mixed: (B, rows, columns, H, D).

    A copy of a few windows is still in the cache when it is read, one of all windows is not. For
    want of a gradient the results can be written to their places.
    """
    heads, D = joint.shape[3:]
    out = joint.new_empty(*joint.shape[:3], heads // 3, D)
    most = PIECE * torch.get_num_threads() // (heads * D)
    cut = pieces(joint, rows, cols, most)
    for block, place in zip(cut, pieces(out, rows, cols, most), strict=True):
        q, k, v = as_tokens(block).chunk(3, dim=1)
        place.copy_(attend(q, k, v, None, dropout_p).transpose(1, 2).reshape(place.shape))
        del q, k, v  # their memory, still in the cache, is the next piece's
    return out


def _with_prefix(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_prefix_tokens: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> Tensor:
    """Put what prefix tokens see, which is everything, before the grid's (B, H, N - P, E)."""
    P, N = num_prefix_tokens, q.shape[2]
    if P == 0:
        return x
    front: Tensor | None = None
    if is_causal:
        front = torch.ones(P, N, dtype=torch.bool, device=q.device).tril()
    elif attn_mask is not None:
        front = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., :P, :]
    return torch.cat([attend(q[:, :, :P], k, v, front, dropout_p), x], dim=2)


@torch.jit.unused
def _free_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    shift: int,
    neighbours: bool,
    num_prefix_tokens: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> Tensor:
    """Windows of one row whose length an exported graph leaves open: all alike, the ends masked."""
    P, B, H = num_prefix_tokens, q.shape[0], q.shape[1]
    T = q.shape[2] - P
    start = shift - window if shift else 0
    count = (T - start + window - 1) // window
    reach = window if neighbours else 0
    first = torch.arange(count, device=q.device).unsqueeze(1) * window + start  # (n, 1)
    asked = first + torch.arange(window, device=q.device)
    seen = first + torch.arange(-reach, window + reach, device=q.device)
    inside = F.pad((seen >= 0) & (seen < T), [P, 0], value=True)  # (n, K)
    q_ids, k_ids = asked.clamp(0, T - 1) + P, seen.clamp(0, T - 1) + P
    k_ids = torch.cat([torch.arange(P, device=q.device).expand(count, -1), k_ids], dim=1)
    mask = pick_pairs(attn_mask, is_causal, q_ids, k_ids)
    inside = inside[None, None, :, None]
    if mask is None:
        mask = inside
    elif mask.dtype == torch.bool:
        mask = mask & inside
    else:
        mask = mask.masked_fill(~inside, float("-inf"))
    mask = mask.expand(B, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)
    x = attend(take(q, q_ids), take(k, k_ids), take(v, k_ids), mask, dropout_p)
    x = x.transpose(1, 2).reshape(B, -1, H, v.shape[-1])
    # Not a slice: whether it takes all would become a condition of the graph.
    return x.index_select(1, torch.arange(T, device=q.device) - start).transpose(1, 2)


def _grid(x: Tensor, num_prefix_tokens: int, grid_size: tuple[int, int]) -> Tensor:
    """Tokens (B, H, N, D) behind the prefix as a map (B, rows, columns, H, D)."""
    H, D = x.shape[1], x.shape[3]
    tokens = x.transpose(1, 2)[:, num_prefix_tokens:]
    # -1 for the batch: TorchScript's ONNX exporter would write its size into the file.
    return tokens.reshape(-1, grid_size[0], grid_size[1], H, D)


# Shapes decide what is computed, which torch.fx cannot follow: it calls this as it is.
torch.fx.wrap("local_attention")


class Local2dAttention(HeadsAttention):
    """Multi-head attention in windows of the token grid, on tokens (B, N, C).

    `set_layout` must tell the grid first: 225 tokens are 15 rows of 15, or 14 rows of 16 and a
    class token. Models of this package do it; for others call `timm_xformers.set_token_layout`.

    Args:
        window_size: Side w of the square windows.
        neighbours: Let a window attend to the eight around it.
        shifted: Move the windows of every second block by w // 2 instead, as Swin does.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: ``window_size`` below 1, both ``neighbours`` and ``shifted``, or what
            `HeadsAttention` refuses.
    """

    mechanism = "local2d"
    needs_fixed_grid = True
    needs_layout = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window_size: int = 8,
        neighbours: bool = True,
        shifted: bool = False,
        **kwargs: Any,
    ) -> None:
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1, e.g. 8.")
        if neighbours and shifted:
            raise ValueError("Windows see their neighbours or are shifted, not both; drop one.")
        super().__init__(dim, num_heads, **kwargs)
        self.window_size = window_size
        self.neighbours = neighbours
        self.shifted = shifted
        self.shift = 0

    def set_layout(
        self, grid_size: tuple[int, int], num_prefix_tokens: int, depth: int = 0
    ) -> None:
        """As `HeadsAttention.set_layout`; shifted windows move in blocks of odd ``depth``."""
        super().set_layout(grid_size, num_prefix_tokens, depth)
        self.shift = self.window_size // 2 if self.shifted and depth % 2 else 0

    def arrange(
        self, num_tokens: int
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Grid, window, shift and prefix tokens of so many tokens; `Local1dAttention` has others.

        Raises:
            ValueError: No layout is set.
        """
        window, shift = self.window_size, self.shift
        return self.told_grid(), (window, window), (shift, shift), self.num_prefix_tokens

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Windowed attention per head, (B, H, N, D)."""
        grid, window, shift, prefix = self.arrange(q.shape[2])
        return local_attention(
            q,
            k,
            v,
            grid_size=grid,
            window_size=window,
            neighbours=self.neighbours,
            shift_size=shift,
            num_prefix_tokens=prefix,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        """Window, for printing."""
        return (
            f"window_size={self.window_size}, neighbours={self.neighbours}, "
            f"shifted={self.shifted}, shift={self.shift}"
        )


class Local1dAttention(Local2dAttention):
    """Multi-head attention in windows of the flattened sequence, on tokens (B, N, C).

    The grid, if known, only tells which tokens are prefix tokens. Arguments are those of
    `Local2dAttention`; a window sees one neighbour on each side.
    """

    mechanism = "local1d"
    needs_fixed_grid = False

    def arrange(
        self, num_tokens: int
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """A grid of one row."""
        self.told_grid()
        prefix = self.num_prefix_tokens
        return (1, num_tokens - prefix), (1, self.window_size), (0, self.shift), prefix
