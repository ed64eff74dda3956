"""Agent attention: a few agents read all tokens, and all tokens read the agents.

Han et al., "Agent Attention", 2023 (arXiv:2312.08874): softmax(Q A^T) (softmax(A K^T) V), both maps
scaled by 1 / sqrt(D), with agents A, the queries averaged over the cells of a square grid. Per
head, time grows as N * n * D for n agents. It is Nyström attention without the inverse.

As in the paper agents are means over cells of the token grid, not of the flattened sequence: a
stretch of a sequence is a strip of the image. So the layer must be told the grid. Departures:

- Cells divide the grid evenly; a token on the border of two counts to both in proportion, so any
  grid goes with any number of agents.
- No biases, which the paper ties to one size of image; its convolution of the values is the option
  ``dwc`` of every mechanism here.
- Prefix tokens (class, registers) read the agents and are read by them, but make none.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor

from timm_xformers.layers.heads import HeadsAttention, attend, working_dtype
from timm_xformers.layers.layout import check_grid
from timm_xformers.layers.masks import refuse_causal, relative_bias
from timm_xformers.layers.means import slot_means

__all__ = ["AgentAttention", "agent_attention", "cell_means"]


def cell_means(x: Tensor, grid_size: tuple[int, int], cells: int) -> Tensor:
    """Means over the cells of a grid of tokens.

    Args:
        x: (B, H, rows * columns, D), in raster order.
        grid_size: Rows and columns.
        cells: Cells along each side.

    Returns:
        (B, H, cells^2, D).
    """
    rows, cols = grid_size
    H, D = x.shape[1], x.shape[3]
    down = slot_means(cells, rows, x.device).to(x.dtype) / rows  # (cells, rows)
    across = slot_means(cells, cols, x.device).to(x.dtype) / cols
    maps = torch.unflatten(x.transpose(1, 2).flatten(2), 1, [rows, cols])  # (B, rows, cols, H * D)
    maps = down @ (across @ maps).flatten(2)  # (B, cells, cells * H * D)
    return torch.unflatten(maps, 2, [cells, H, D]).flatten(1, 2).transpose(1, 2)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_size: tuple[int, int],
    cells: int,
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Mix tokens through cells^2 agents.

    Args:
        q: Queries (B, H, N, D), unscaled; N = num_prefix_tokens + rows * columns, in raster order.
        k: Keys (B, H, N, D).
        v: Values (B, H, N, E).
        grid_size: Rows and columns of the token grid.
        cells: Cells along each side of the grid, one agent per cell.
        num_prefix_tokens: Tokens before the grid.
        attn_mask: None, or (B, 1, 1, N): bool (True = attend) or an additive bias per key; 80 below
            the highest is left out. A cell without tokens has no agent. Without any key, or any
            agent, a query gives zeros.
        dropout_p: Dropout probability on both maps.

    Returns:
        (B, H, N, E) in the type of ``v``.

    Raises:
        ValueError: ``attn_mask`` differs between queries, or N does not fit the grid.
    """
    check_grid(q.shape[2], grid_size, num_prefix_tokens)
    bias = relative_bias(attn_mask, "agent", torch.promote_types(q.dtype, torch.float32))
    if bias is None:
        agents = cell_means(q[:, :, num_prefix_tokens:], grid_size, cells)
        return attend(q, agents, attend(agents, k, v, None, dropout_p), None, dropout_p)
    # Left-out tokens take no part in an agent; an agent of none is hidden from queries.
    dtype = working_dtype(q.dtype, wide=False)
    weight = bias[..., num_prefix_tokens:, :].exp().to(dtype)
    share = cell_means(weight, grid_size, cells)  # (..., cells^2, 1)
    sums = cell_means(q[:, :, num_prefix_tokens:].to(dtype) * weight, grid_size, cells)
    agents = (sums / share.clamp_min(1e-37)).to(q.dtype)
    context = attend(agents, k, v, bias.transpose(-2, -1), dropout_p)
    return attend(q, agents, context, (share > 0).transpose(-2, -1), dropout_p)


# Sizes and masks decide what is computed, which torch.fx cannot follow: it calls these as they are.
torch.fx.wrap("agent_attention")
torch.fx.wrap("refuse_causal")


class AgentAttention(HeadsAttention):
    """Multi-head agent attention on tokens (B, N, C).

    `set_layout` must tell the grid first. Models of this package do it; for others call
    `timm_xformers.set_token_layout`. There are no parameters beside those of exact attention.

    Args:
        num_agents: n, a square number: the agents' own grid has sqrt(n) rows and columns.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: ``num_agents`` is no square number, or what `HeadsAttention` refuses.
    """

    mechanism = "agent"
    needs_fixed_grid = True
    needs_layout = True
    causal = False
    masks = "keys"

    def __init__(
        self, dim: int, num_heads: int = 8, *, num_agents: int = 49, **kwargs: Any
    ) -> None:
        cells = max(int(max(num_agents, 0) ** 0.5), 1)
        if cells * cells != num_agents:
            raise ValueError(
                f"num_agents={num_agents} is no square number, and agents lie on a square grid; "
                f"use {cells**2} or {(cells + 1) ** 2}."
            )
        super().__init__(dim, num_heads, **kwargs)
        self.num_agents = num_agents
        self.cells = cells

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Agent attention per head, (B, H, N, D)."""
        refuse_causal(is_causal, "agent")
        return agent_attention(
            q,
            k,
            v,
            grid_size=self.told_grid(),
            cells=self.cells,
            num_prefix_tokens=self.num_prefix_tokens,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        """Agents, for printing."""
        return f"num_agents={self.num_agents}"
