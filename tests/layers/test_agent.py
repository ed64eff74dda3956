"""Agent attention against its two maps written out."""

import pytest
import torch
from torch.nn import functional as F

from timm_xformers.layers.agent import agent_attention, cell_means
from timm_xformers.layers.factory import attention_class


def explicit(q, k, v, agents, keys=None, filled=None):
    scale = q.shape[-1] ** -0.5
    read, spread = agents @ k.mT * scale, q @ agents.mT * scale
    if keys is not None:
        read = read.masked_fill(~keys, float("-inf"))
        spread = spread.masked_fill(~filled, float("-inf"))
    return spread.softmax(-1) @ (read.softmax(-1) @ v)


def draw(B, H, N, D, dtype):
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, H, N, D, generator=rng, dtype=dtype, requires_grad=True) for _ in range(3)
    ]


def by_hand(x, grid, cells):
    """Means over cells (B, H, cells^2, D): every token cut into cells x cells parts."""
    B, H, _, D = x.shape
    fine = x.reshape(B, H, *grid, D)
    fine = fine.repeat_interleave(cells, dim=2).repeat_interleave(cells, dim=3)
    parts = fine.reshape(B, H, cells, grid[0], cells, grid[1], D)
    return parts.mean(dim=(3, 5)).flatten(2, 3)


@pytest.mark.parametrize("cells", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [(1, 1), (2, 6), (5, 4), (14, 9)], ids=str)
def test_means_over_cells_of_any_grid(grid, cells):
    x = draw(2, 3, grid[0] * grid[1], 4, torch.float64)[0]
    torch.testing.assert_close(cell_means(x, grid, cells), by_hand(x, grid, cells))
    if grid[0] % cells == grid[1] % cells == 0:  # the paper's pooling
        maps = x.transpose(2, 3).reshape(2, -1, *grid)
        pooled = F.adaptive_avg_pool2d(maps, cells).reshape(2, 3, 4, -1).mT
        torch.testing.assert_close(cell_means(x, grid, cells), pooled)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("B", "grid", "prefix", "cells", "D"),
    [
        (1, (1, 1), 0, 1, 8),
        (7, (4, 4), 1, 2, 8),
        (2, (3, 5), 2, 4, 16),
        (2, (14, 14), 1, 7, 64),
    ],
)
def test_values_and_gradients_are_those_of_the_two_maps(B, grid, prefix, cells, D, dtype, atol):
    q, k, v = inputs = draw(B, 2, prefix + grid[0] * grid[1], D, dtype)
    fast = agent_attention(q, k, v, grid, cells, prefix)
    slow = explicit(q, k, v, by_hand(q[:, :, prefix:], grid, cells))
    torch.testing.assert_close(fast, slow, atol=atol, rtol=1e-4)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for found, expected in zip(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=20 * atol, rtol=1e-3)


def test_left_out_tokens_take_no_part_in_agents_and_empty_cells_have_none():
    grid, cells, prefix = (4, 6), 2, 1
    q, k, v = draw(2, 3, 25, 8, torch.float64)
    keep = torch.rand(2, 1, 1, 25, generator=torch.Generator().manual_seed(2)) > 0.4
    cell = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(2, 0).repeat_interleave(3, 1).flatten()
    keep[0, ..., 1:] &= cell != 2  # a cell without tokens
    kept = keep[..., prefix:].mT.double()
    sums = torch.stack([(q[:, :, 1:] * kept)[:, :, cell == c].sum(2) for c in range(4)], dim=2)
    counts = torch.stack([kept[:, :, cell == c].sum(2) for c in range(4)], dim=2)
    filled = (counts > 0).mT
    assert not filled.all()
    expected = explicit(q, k, v, sums / counts.clamp_min(1), keep, filled)
    torch.testing.assert_close(agent_attention(q, k, v, grid, cells, prefix, keep), expected)
    keep[0, ..., 1:] = False  # the class token alone: no agent
    assert (agent_attention(q, k, v, grid, cells, prefix, keep)[0] == 0).all()


def test_agents_are_those_of_the_told_grid():
    torch.manual_seed(0)
    layer = attention_class("agent_a16")(32, 4)
    x = torch.randn(2, 25, 32)
    with pytest.raises(ValueError, match="agent attention has not been told where tokens lie"):
        layer(x)
    layer.set_layout((4, 6), 1)
    wide = layer(x)
    layer.set_layout((6, 4), 1)
    assert (layer(x) - wide).abs().max() > 1e-4
    with pytest.raises(ValueError, match="do not fill a grid of 6 x 4 and 1 prefix tokens"):
        layer(x[:, 1:])


def test_dropout_falls_on_the_maps():
    torch.manual_seed(0)
    layer = attention_class("agent_a16")(32, 4, attn_drop=0.5)
    layer.set_layout((5, 5), 0)
    x = torch.randn(2, 25, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("agents", "near"), [(50, "49 or 64"), (2, "1 or 4"), (0, "1 or 4")])
def test_agents_are_a_square_number(agents, near):
    with pytest.raises(ValueError, match=f"num_agents={agents} is no square number.*use {near}"):
        attention_class("agent_a16", num_agents=agents)(32, 4)
