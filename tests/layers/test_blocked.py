"""Performer attention in blocks against the same in plain order."""

import functools

import pytest
import timm.layers
import torch

from timm_xformers.layers import blocked, performer
from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.performer import KERNELS, orthogonal_directions, performer_attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two images of nine tokens make a block, and no size is too small for blocks."""
    monkeypatch.setattr(blocked, "BLOCK_TOKENS", 18)
    monkeypatch.setattr(blocked, "LEAST_FEATURES", 0)


def draw(B, H, N, D, S=None, dtype=torch.float64, scale=1.0, seed=0):
    """Queries, keys and values as a joint projection of tokens leaves them: (B, N, H, D) behind."""
    rng = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(B, n, H, D, generator=rng, dtype=torch.float64))
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n in (N, S or N, S or N)
    ]


def plainly(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "LEAST_FEATURES", 1 << 62)
        return performer_attention(*args)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("B", "H", "N", "S", "D", "m"),
    [(1, 1, 1, 1, 4, 3), (5, 2, 9, 9, 8, 16), (3, 2, 9, 4, 8, 5), (2, 3, 37, 37, 16, 32)],
)
def test_values_and_gradients_are_those_of_the_plain_order(monkeypatch, B, H, N, S, D, m, kernel):
    inputs = draw(B, H, N, D, S)
    omega = orthogonal_directions(m, D, seed=1).double()
    out = performer_attention(*inputs, omega, kernel)
    plain = plainly(monkeypatch, *inputs, omega, kernel)
    assert type(out.grad_fn) is not type(plain.grad_fn)
    torch.testing.assert_close(out, plain)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(plain, inputs, upstream)
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_and_its_gradient(kernel):
    omega = orthogonal_directions(6, 4, seed=2).double()
    inputs = [x.detach().requires_grad_() for x in draw(2, 2, 5, 4, seed=3)]

    def attention(q, k, v):
        return performer_attention(q, k, v, omega, kernel)

    # Away from zero, where relu has a kink.
    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)
    q, k, v = inputs
    only_v = torch.autograd.grad(attention(q.detach(), k.detach(), v).sum(), v, create_graph=True)
    assert only_v[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_precision_is_finite_and_as_good_as_the_plain_order(
    monkeypatch, kernel, dtype, scale
):
    inputs = draw(3, 2, 37, 8, dtype=dtype, scale=scale)
    omega = orthogonal_directions(16, 8, seed=1).to(dtype)
    rng = torch.Generator().manual_seed(4)
    upstream = (torch.randn(3, 2, 37, 8, generator=rng) / max(scale, 1.0)).to(dtype)

    def run(attention, dtype):
        wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*wide, omega.to(dtype), kernel)
        return out, *torch.autograd.grad(out, wide, upstream.to(dtype))

    ours = run(performer_attention, dtype)
    plain = run(functools.partial(plainly, monkeypatch), dtype)
    exact = run(functools.partial(plainly, monkeypatch), torch.float64)
    assert ours[0].dtype == dtype
    for mine, other, true in zip(ours, plain, exact, strict=True):
        assert mine.isfinite().all()
        # The kernels without exponentials take the mixed values as they were handed out, rounded.
        allowed = 4 * (other - true).norm() + 1e-6 * true.norm()
        # Where one weight takes all, the gradient of what chose it is rounding alone.
        allowed += torch.finfo(dtype).eps * min(scale, 1.0) ** 2
        assert (mine - true).norm() <= allowed


@pytest.mark.parametrize("kernel", ["relu", "softmax"])
def test_cutting_into_blocks_changes_nothing(monkeypatch, kernel):
    layer = attention_class(f"performer_{kernel}_m32")(32, 4)
    x = torch.randn(7, 9, 32, requires_grad=True)
    out = layer(x)
    grad = torch.autograd.grad(out.square().sum(), x)
    monkeypatch.setattr(blocked, "BLOCK_TOKENS", 1 << 20)
    whole = layer(x)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(grad, torch.autograd.grad(whole.square().sum(), x))


@pytest.mark.parametrize("kernel", ["relu", "softmax"])
def test_an_image_does_not_depend_on_its_batch(kernel):
    layer = attention_class(f"performer_{kernel}_m32")(32, 4)
    x = torch.randn(5, 9, 32)
    other = x.clone()
    other[1:] = 100 * torch.randn(4, 9, 32)
    assert torch.equal(layer(x)[0], layer(other)[0])


def test_chosen_where_it_pays_only(monkeypatch):
    q = draw(2, 2, 9, 8, dtype=torch.float32)[0]
    assert blocked.in_blocks(q, 576)
    assert not blocked.in_blocks(q.to("meta"), 576)
    timm.layers.set_fused_attn(False)
    try:
        assert not blocked.in_blocks(q, 576)
    finally:
        timm.layers.set_fused_attn()
    monkeypatch.undo()
    assert not blocked.in_blocks(q, 576)
    assert blocked.in_blocks(q, 8 * 4 * 1025 * 64)


def test_masks_take_the_plain_order(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("blocks have no masks")

    monkeypatch.setattr(performer, "blocked_performer", refuse)
    q, k, v = draw(2, 2, 9, 8)
    omega = orthogonal_directions(16, 8, seed=1).double()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert performer_attention(q, k, v, omega, attn_mask=mask).isfinite().all()
    assert performer_attention(q, k, v, omega, is_causal=True).isfinite().all()
    with pytest.raises(AssertionError, match="no masks"):
        performer_attention(q, k, v, omega)
