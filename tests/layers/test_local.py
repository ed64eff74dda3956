"""Local attention against a dense map with a mask written from the definition."""

import pytest
import torch
from torch.nn import functional as F

from timm_xformers.layers.local import (
    Local1dAttention,
    Local2dAttention,
    _free_row,
    local_attention,
)
from timm_xformers.layers.windows import cut_map, cut_side, join_map, side_by_side

DTYPES = [pytest.param(torch.float64, 1e-12, id="f64"), pytest.param(torch.float32, 1e-5, id="f32")]


def dense_mask(grid, window, neighbours, shift, prefix):
    """Pair by pair: which of N tokens may see which."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # (rows * columns, 2)
    window, shift = torch.tensor(window), torch.tensor(shift)
    padded = -(-torch.tensor(grid) // window) * window
    # After the roll a token at t lands at t - shift, counted around the padded map.
    boxes = (places - shift) % padded // window
    apart = (boxes[:, None] - boxes).abs().amax(-1)
    near = ((places[:, None] - places).abs() < window).all(-1)
    seen = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    seen[prefix:, prefix:] = apart <= 1 if neighbours else (apart == 0) & near
    return seen


def draw(B, H, N, D, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, H, N, D, generator=rng, dtype=dtype, requires_grad=True) for _ in range(3)
    ]


CASES = [
    pytest.param((1, 1), (1, 4), True, (0, 0), 0, id="one-token"),
    pytest.param((1, 2), (1, 1), True, (0, 0), 1, id="two-tokens"),
    pytest.param((1, 17), (1, 4), True, (0, 0), 0, id="1d-padded"),
    pytest.param((1, 17), (1, 4), True, (0, 0), 1, id="1d-class-token"),
    pytest.param((1, 17), (1, 4), False, (0, 0), 1, id="1d-alone"),
    pytest.param((1, 17), (1, 4), False, (0, 2), 1, id="1d-shifted-padded"),
    pytest.param((1, 16), (1, 8), True, (0, 0), 0, id="1d-two-windows"),
    pytest.param((6, 6), (3, 3), True, (0, 0), 1, id="2d"),
    pytest.param((9, 7), (2, 2), True, (0, 0), 2, id="2d-odd"),
    pytest.param((7, 7), (4, 4), False, (2, 2), 1, id="2d-shifted-padded"),
    pytest.param((8, 8), (4, 4), False, (2, 2), 0, id="2d-shifted"),
    pytest.param((3, 9), (4, 4), True, (0, 0), 1, id="2d-one-row-of-windows"),
    pytest.param((14, 14), (7, 7), False, (3, 3), 1, id="197-tokens"),
    pytest.param((1, 1024), (1, 64), True, (0, 0), 1, id="1025-tokens"),
]


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize(("grid", "window", "neighbours", "shift", "prefix"), CASES)
def test_values_and_gradients_match_the_masked_map(
    grid, window, neighbours, shift, prefix, dtype, atol
):
    N = prefix + grid[0] * grid[1]
    inputs = draw(7 if N < 50 else 1, 2, N, 8 if N < 50 else 32, dtype)
    fast = local_attention(
        *inputs,
        grid_size=grid,
        window_size=window,
        neighbours=neighbours,
        shift_size=shift,
        num_prefix_tokens=prefix,
    )
    mask = dense_mask(grid, window, neighbours, shift, prefix)
    slow = F.scaled_dot_product_attention(*(t.double() for t in inputs), attn_mask=mask)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.testing.assert_close(fast.double(), slow, atol=atol, rtol=0)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, inputs, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b.double(), atol=50 * atol, rtol=0)


@pytest.mark.parametrize("kind", ["keys", "pairs", "additive", "per-head", "causal"])
@pytest.mark.parametrize("windows", ["neighbours", "alone", "shifted"])
def test_masks_meet_the_windows(kind, windows):
    grid, window, prefix = (5, 6), (2, 3), 1
    neighbours, shift = windows == "neighbours", (1, 1) if windows == "shifted" else (0, 0)
    N = 31
    q, k, v = (t.detach() for t in draw(2, 2, N, 8))
    rng = torch.Generator().manual_seed(3)
    shape = {"keys": (2, 1, 1, N), "per-head": (2, 2, N, N)}.get(kind, (2, 1, N, N))
    given = torch.rand(shape, generator=rng) > 0.4
    allowed = dense_mask(grid, window, neighbours, shift, prefix)
    reference_mask = torch.ones(N, N).tril().bool() if kind == "causal" else given
    bias = torch.zeros(1, dtype=torch.float64)
    if kind == "additive":
        bias = torch.randn(shape, generator=rng, dtype=torch.float64)
        given = bias.masked_fill(~given, float("-inf"))
    out = local_attention(
        q,
        k,
        v,
        grid_size=grid,
        window_size=window,
        neighbours=neighbours,
        shift_size=shift,
        num_prefix_tokens=prefix,
        attn_mask=None if kind == "causal" else given,
        is_causal=kind == "causal",
    )
    scores = q @ k.mT / 8**0.5 + bias
    scores = scores.masked_fill(~(allowed & reference_mask), float("-inf"))
    torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(0.0) @ v)


@pytest.mark.parametrize(("neighbours", "window"), [(True, 17), (False, 17), (True, 9)])
@pytest.mark.parametrize("grid", [(1, 17), (5, 5), (3, 7)])
def test_exact_when_the_window_covers_everything(grid, neighbours, window):
    N = 1 + grid[0] * grid[1]
    q, k, v = draw(2, 2, N, 8)
    size = (window, window)
    out = local_attention(
        q, k, v, grid_size=grid, window_size=size, neighbours=neighbours, num_prefix_tokens=1
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("shift", [(0, 0), (1, 1)])
def test_gradcheck(shift):
    def attention(q, k, v):
        return local_attention(
            q,
            k,
            v,
            grid_size=(3, 3),
            window_size=(2, 2),
            neighbours=shift == (0, 0),
            shift_size=shift,
            num_prefix_tokens=1,
        )

    assert torch.autograd.gradcheck(attention, draw(1, 2, 10, 4))


@pytest.mark.parametrize(("grid", "window", "neighbours", "shift", "prefix"), CASES)
def test_every_token_asks_once_and_its_windows_are_joined_in_order(
    grid, window, neighbours, shift, prefix
):
    rows = cut_side(grid[0], window[0], shift[0], neighbours)
    cols = cut_side(grid[1], window[1], shift[1], neighbours)
    ids = torch.arange(2 * grid[0] * grid[1]).reshape(2, *grid, 1, 1)
    queries, keys = (cut_map(ids, rows, cols, mine) for mine in (False, neighbours))
    asked = torch.cat([q.flatten() for q in queries])
    assert torch.equal(asked.sort().values, ids.flatten())
    assert torch.equal(join_map(queries, rows, cols).flatten(), ids.flatten())
    for side, runs in zip(grid, (rows, cols), strict=True):
        assert len(runs) <= 4, "windows of one size, in the middle of a side, are one run"
        assert sum(many * size for many, _, size, _, _ in runs) == side
    for q, k in zip(queries, keys, strict=True):
        for asks, answers in zip(q.flatten(1).tolist(), k.flatten(1).tolist(), strict=True):
            assert set(asks) <= set(answers)
            assert len(set(answers)) == len(answers), "a key counts once"


# PyTorch has no batching rule for its fused attention, and takes one call after another.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [Local1dAttention, Local2dAttention])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_joint_projection_is_cut_at_once(kind, depth):
    torch.manual_seed(0)
    layer = kind(16, 2, window_size=4, neighbours=False, shifted=True).double().eval()
    layer.set_layout((9, 8), 0, depth)
    x = torch.randn(3, 72, 16, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = layer.project(x)
        joint = side_by_side(q, k, v)
        assert joint.data_ptr() == q.data_ptr()
        assert torch.equal(joint, torch.cat([q, k, v], dim=1))
        torch.testing.assert_close(layer(x), layer(x.clone().requires_grad_()))
        fast = layer(x)
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], fast)
        mask = torch.ones(3, 1, 1, 72, dtype=torch.bool)
        torch.testing.assert_close(layer(x, attn_mask=mask), fast)
        # What does not lie like that is cut one by one.
        assert side_by_side(k, q, v) is None
        assert side_by_side(q, k, k) is None
        assert side_by_side(q, k.clone(), v) is None
        assert side_by_side(q.contiguous(), k.contiguous(), v.contiguous()) is None
        assert side_by_side(q[:, :, :40], k[:, :, :40], v[:, :, :40]) is None
    with torch.enable_grad():
        torch.testing.assert_close(layer(x), fast)
        assert side_by_side(q, k, v) is None, "its gradient would be that of a whole projection"


def test_a_layer_reaches_its_neighbours_and_no_further():
    torch.manual_seed(0)
    layer = Local1dAttention(16, 2, window_size=4).eval()
    layer.set_layout((1, 24), 0)
    x = torch.randn(1, 24, 16)
    moved = x.clone()
    moved[:, 0] += 1.0
    changed = (layer(x) - layer(moved)).abs().sum(-1)[0] > 0
    assert changed[:8].all()
    assert not changed[8:].any()


@pytest.mark.parametrize("kind", [Local1dAttention, Local2dAttention])
def test_shifted_windows_cross_borders_after_two_blocks(kind):
    torch.manual_seed(0)
    blocks = [kind(16, 2, window_size=4, neighbours=False, shifted=True).eval() for _ in range(2)]
    for depth, block in enumerate(blocks):
        block.set_layout((8, 8), 0, depth)
    x = torch.randn(1, 64, 16)
    moved = x.clone()
    moved[:, 0] += 1.0
    first, first_moved = blocks[0](x), blocks[0](moved)
    one = ((first - first_moved).abs().sum(-1)[0] > 0).reshape(8, 8)
    two = ((blocks[1](first) - blocks[1](first_moved)).abs().sum(-1)[0] > 0).reshape(8, 8)
    reach = torch.zeros(8, 8, dtype=torch.bool)
    if kind is Local1dAttention:  # tokens 0 to 3, then the shifted windows 0 to 1 and 2 to 5
        reach.view(-1)[:4] = True
        assert torch.equal(one, reach)
        reach.view(-1)[:6] = True
    else:
        reach[:4, :4] = True
        assert torch.equal(one, reach)
        reach[:6, :6] = True
    assert torch.equal(two, reach)


def test_class_token_sees_and_is_seen_by_all():
    torch.manual_seed(0)
    layer = Local2dAttention(16, 2, window_size=2).eval()
    layer.set_layout((8, 8), 1)
    x = torch.randn(1, 65, 16)
    far, front = x.clone(), x.clone()
    far[:, 64] += 1.0
    front[:, 0] += 1.0
    assert ((layer(x) - layer(far)).abs().sum(-1)[0] > 0)[0]
    assert ((layer(x) - layer(front)).abs().sum(-1)[0] > 0).all()


@pytest.mark.parametrize("kind", [Local1dAttention, Local2dAttention])
@pytest.mark.parametrize("N", [64, 65, 197, 225])
def test_tokens_are_not_taken_for_a_square(kind, N):
    with pytest.raises(ValueError, match=r"not been told where tokens lie.*set_token_layout"):
        kind(16, 2)(torch.randn(1, N, 16))


@pytest.mark.parametrize("kind", [None, "causal", "keys", "pairs", "bias"])
@pytest.mark.parametrize(("neighbours", "shift"), [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("length", [9, 16, 19])
def test_a_row_of_open_length_is_the_same_row(length, neighbours, shift, kind):
    """What exported graphs hold where the number of tokens is free."""
    for P in (0, 2):
        N, rng = P + length, torch.Generator().manual_seed(1)
        q, k, v = draw(2, 3, N, 4)
        masks = {
            "keys": torch.rand(2, 1, 1, N, generator=rng) > 0.3,
            "pairs": torch.rand(2, 1, N, N, generator=rng) > 0.3,
            "bias": torch.randn(2, 1, 1, N, generator=rng, dtype=torch.float64),
        }
        mask, causal = masks.get(kind), kind == "causal"
        expected = local_attention(
            q, k, v, (1, length), (1, 4), neighbours, (0, shift), P, mask, causal
        )
        row = _free_row(q, k, v, 4, shift, neighbours, P, mask, causal, 0.0)
        torch.testing.assert_close(row, expected[:, :, P:], rtol=0, atol=1e-12)


def test_refusals():
    layer = Local2dAttention(16, 2, window_size=4)
    layer.set_layout((8, 8), 1)
    with pytest.raises(ValueError, match=r"197 tokens do not fill a grid of 8 x 8 and 1 prefix"):
        layer(torch.randn(1, 197, 16))
    with pytest.raises(ValueError, match="not both"):
        Local2dAttention(16, 2, neighbours=True, shifted=True)
    with pytest.raises(ValueError, match="window_size=0 must be at least 1"):
        Local1dAttention(16, 2, window_size=0)
