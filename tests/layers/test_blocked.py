"""Performer attention in blocks against the same layer in plain order."""

import functools

import pytest
import timm.layers
import torch

from timm_xformers.layers import blocked, performer
from timm_xformers.layers.performer import PerformerAttention

KERNELS = ("relu", "gelu", "elu")


@pytest.fixture(autouse=True, params=[1, 18, 1 << 20], ids=["heads", "images", "all"])
def block_sizes(request, monkeypatch):
    """A head or two images or everything makes a block, and no size is too small for blocks."""
    monkeypatch.setattr(blocked, "BLOCK_TOKENS", request.param)
    monkeypatch.setattr(blocked, "LEAST_FEATURES", 0)


def build(kernel="relu", m=16, dim=16, **kwargs):
    torch.manual_seed(0)
    return PerformerAttention(
        dim, 2, kernel=kernel, num_features=m, qkv_bias=True, **kwargs
    ).double()


def tokens(B, N, dim=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, dim, generator=rng, dtype=torch.float64, requires_grad=True)


def plainly(monkeypatch, layer, x):
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "LEAST_FEATURES", 1 << 62)
        patch.setattr(performer, "blocked_performer", None)
        return layer(x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("B", "N", "m"), [(1, 1, 3), (5, 9, 16), (3, 37, 5)])
def test_values_and_gradients_are_those_of_the_plain_order(monkeypatch, B, N, m, kernel):
    layer, x = build(kernel, m), tokens(B, N)
    out = layer(x)
    plain = plainly(monkeypatch, layer, x)
    torch.testing.assert_close(out, plain)
    upstream = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad(out, wanted, upstream)
    theirs = torch.autograd.grad(plain, wanted, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_and_its_gradient(kernel):
    layer, x = build(kernel, 3, dim=4), tokens(2, 3, dim=4, seed=3)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_precision_is_finite_and_as_good_as_the_plain_order(
    monkeypatch, kernel, dtype, scale
):
    rng = torch.Generator().manual_seed(0)
    qkv = (scale * torch.randn(3, 37, 3, 2, 8, generator=rng)).to(dtype)
    omega = torch.randn(16, 8, generator=rng).to(dtype)
    upstream = (torch.randn(3, 37, 16, generator=rng) / max(scale, 1.0)).to(dtype)

    def plain(qkv, omega):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return performer._performer(q, k, v, omega, kernel).transpose(1, 2).flatten(2)

    def run(attention, dtype):
        given = qkv.detach().to(dtype).requires_grad_()
        # As the layer has it: sums of float16 features need a wider type.
        wide = torch.float32 if dtype == torch.float16 else dtype
        out = attention(given, omega.to(wide)).to(dtype)
        return out, *torch.autograd.grad(out, given, upstream.to(dtype))

    in_blocks = functools.partial(
        blocked.blocked_performer, kernel=kernel, plain=performer._performer
    )
    true = run(plain, torch.float64)
    for mine, other, exact in zip(run(in_blocks, dtype), run(plain, dtype), true, strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        # Blocks take the mixed values for the gradient as they were handed out, rounded.
        allowed = 4 * (other - exact).norm() + 1e-6 * exact.norm()
        assert (mine - exact).norm() <= allowed


def test_an_image_does_not_depend_on_its_batch():
    layer, x = build(), tokens(5, 9)
    other = torch.cat([x[:1], 100 * tokens(4, 9, seed=1)])
    assert torch.equal(layer(x)[0], layer(other)[0])


def test_under_autocast(monkeypatch):
    layer, x = build().float(), tokens(3, 37).float().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = layer(x), plainly(monkeypatch, layer, x)
        out.float().square().sum().backward()
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, atol=0.02, rtol=0.05)


def test_chosen_where_it_pays_only(monkeypatch):
    x = tokens(2, 9)
    assert blocked.in_blocks(x, 576)
    assert not blocked.in_blocks(x.to("meta"), 576)
    timm.layers.set_fused_attn(False)
    try:
        assert not blocked.in_blocks(x, 576)
    finally:
        timm.layers.set_fused_attn()
    monkeypatch.undo()
    assert not blocked.in_blocks(x, 576)
    assert blocked.in_blocks(x, 8 * 4 * 1025 * 64)


def test_masks_norms_and_exponentials_take_the_plain_order(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("blocked")

    monkeypatch.setattr(performer, "blocked_performer", refuse)
    x = tokens(2, 9)
    with pytest.raises(AssertionError, match="blocked"):
        build()(x)
    build()(x, attn_mask=torch.ones(2, 1, 1, 9, dtype=torch.bool))
    build()(x, is_causal=True)
    build("softmax")(x)
    build(qk_norm=True, norm_layer=torch.nn.LayerNorm)(x)
