"""Performer attention in blocks against the same layer in its plain form."""

import functools

import pytest
import timm.layers
import torch

from timm_xformers.layers import performer
from timm_xformers.layers.performer import PerformerAttention, cpu_blocks

KERNELS = ("relu", "gelu", "elu")


@pytest.fixture(autouse=True, params=[1, 18, 1 << 20], ids=["heads", "images", "all"])
def block_sizes(request, monkeypatch):
    """A head or two images or everything makes a block, and no size is too small for blocks."""
    monkeypatch.setattr(cpu_blocks, "BLOCK_TOKENS", request.param)
    monkeypatch.setattr(cpu_blocks, "LEAST_FEATURES", 0)
    monkeypatch.setattr(cpu_blocks, "LEAST_FEATURES_NO_GRAD", 0)


def build(kernel="relu", m=16, dim=16, **kwargs):
    torch.manual_seed(0)
    return PerformerAttention(
        dim, 2, kernel=kernel, num_features=m, qkv_bias=True, **kwargs
    ).double()


def tokens(B, N, dim=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, dim, generator=rng, dtype=torch.float64, requires_grad=True)


def plainly(layer, x):
    timm.layers.set_fused_attn(False)
    try:
        assert layer.form(x) == "plain"
        return layer(x)
    finally:
        timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("B", "N", "m"), [(1, 1, 3), (5, 9, 16), (3, 37, 5)])
def test_values_and_gradients_are_those_of_the_plain_form(B, N, m, kernel):
    layer, x = build(kernel, m), tokens(B, N)
    assert layer.form(x) == "cpu_blocks"
    out = layer(x)
    plain = plainly(layer, x)
    torch.testing.assert_close(out, plain)
    upstream = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad(out, wanted, upstream)
    theirs = torch.autograd.grad(plain, wanted, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_and_its_gradient(kernel):
    layer, x = build(kernel, 2, dim=4), tokens(2, 2, dim=4, seed=3)
    assert layer.form(x) == "cpu_blocks"
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_precision_is_finite_and_as_good_as_the_plain_form(kernel, dtype, scale):
    rng = torch.Generator().manual_seed(0)
    qkv = (scale * torch.randn(3, 3, 2, 37, 8, generator=rng)).to(dtype)
    omega = torch.randn(16, 8, generator=rng).to(dtype)
    upstream = (torch.randn(3, 2, 37, 8, generator=rng) / max(scale, 1.0)).to(dtype)

    def run(attention, dtype):
        given = qkv.detach().to(dtype).requires_grad_()
        # As the layer has it: sums of float16 features need a wider type.
        wide = torch.float32 if dtype == torch.float16 else dtype
        out = attention(*given, omega.to(wide), kernel).to(dtype)
        return out, *torch.autograd.grad(out, given, upstream.to(dtype))

    plain = performer._performer
    in_blocks = functools.partial(cpu_blocks.blocked_performer, plain=plain)
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


def test_under_autocast():
    layer, x = build().float(), tokens(3, 37).float().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.form(x) == "cpu_blocks"
        out, plain = layer(x), plainly(layer, x)
        out.float().square().sum().backward()
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("kernel", ["softmax", "exp"])
def test_exponentials_a_few_images_at_a_time(kernel, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "LEAST_EXPONENTIALS", 0)
    monkeypatch.setattr(cpu_blocks, "PIECE_FEATURES", 2 * 2 * 9 * 16)
    layer, x = build(kernel), tokens(5, 9)
    assert layer.form(x) == "cpu_blocks"
    results = []
    for out in (layer(x), plainly(layer, x)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, layer = tokens(5, 9).float(), layer.float()
        torch.testing.assert_close(layer(narrow), plainly(layer, narrow), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_and_keys_of_different_length(kernel):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, n, 8, generator=rng, dtype=torch.float64, requires_grad=True)
        for n in (5, 9, 9)
    )
    omega = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    results = []
    for attention in (
        functools.partial(cpu_blocks.blocked_performer, plain=performer._performer),
        performer._performer,
    ):
        out = attention(q, k, v, omega, kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


def test_chosen_where_it_pays_only(monkeypatch):
    q = torch.randn(2, 2, 9, 8)
    assert cpu_blocks.pays(q, 16, False)
    assert not cpu_blocks.pays(q.to("meta"), 16, False)
    timm.layers.set_fused_attn(False)
    try:
        assert not cpu_blocks.pays(q, 16, False)
    finally:
        timm.layers.set_fused_attn()
    monkeypatch.undo()
    assert not cpu_blocks.pays(q, 16, False)
    larger = torch.empty(1, 4, 1025, 8)
    assert cpu_blocks.pays(larger, 64, False)
    assert not cpu_blocks.pays(larger.expand(8, -1, -1, -1), 64, True)
    assert cpu_blocks.pays(larger.expand(64, -1, -1, -1), 64, True)
    with torch.no_grad():
        assert not cpu_blocks.pays(larger, 64, False)
        assert cpu_blocks.pays(larger.expand(8, -1, -1, -1), 64, False)


def test_form_names_what_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("blocked")

    monkeypatch.setattr(cpu_blocks, "blocked_performer", refuse)
    x = tokens(2, 9)
    normed = build(qk_norm=True, norm_layer=torch.nn.LayerNorm)
    for layer in (build(), normed):
        assert layer.form(x) == "cpu_blocks"
        with pytest.raises(AssertionError, match="blocked"):
            layer(x)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for layer, options in (
        (build(), {"attn_mask": mask}),
        (build(), {"is_causal": True}),
        (build("softmax"), {}),
        (build("exp"), {}),
    ):
        assert layer.form(x, **options) == "plain"
        layer(x, **options)
