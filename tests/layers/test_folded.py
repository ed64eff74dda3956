"""Performer attention with folded projections against the layer in its plain order."""

import pytest
import torch

from timm_xformers.layers import blocked, folded, performer
from timm_xformers.layers.performer import KERNELS, PerformerAttention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two images of nine tokens make a block, and folding is always worth it."""
    monkeypatch.setattr(blocked, "BLOCK_TOKENS", 18)
    monkeypatch.setattr(blocked, "LEAST_FEATURES", 0)
    monkeypatch.setattr(folded, "LEAST_GAIN", 0.0)


def build(kernel="relu", bias=False, **kwargs):
    torch.manual_seed(0)
    layer = PerformerAttention(
        12, 3, attn_head_dim=8, kernel=kernel, num_features=5, qkv_bias=bias, **kwargs
    ).double()
    if bias:
        torch.nn.init.normal_(layer.qkv.bias)
    return layer


def plainly(monkeypatch, layer, x):
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "LEAST_FEATURES", 1 << 62)
        return layer(x)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("B", "N"), [(1, 1), (5, 9), (3, 37)])
def test_values_and_gradients_are_those_of_the_plain_order(monkeypatch, B, N, kernel, bias):
    layer = build(kernel, bias)
    x = torch.randn(B, N, 12, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    monkeypatch.setattr(performer, "folded_performer", None)  # from here on it would fail
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
    torch.manual_seed(0)
    layer = PerformerAttention(
        2, 2, attn_head_dim=3, kernel=kernel, num_features=2, qkv_bias=True
    ).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    given = (x, layer.qkv.weight, layer.qkv.bias)

    def mixed(x, weight, bias):
        parameters = {"qkv.weight": weight, "qkv.bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(mixed, given)
    assert torch.autograd.gradgradcheck(mixed, given)


def test_frozen_weights_and_tokens():
    layer = build(bias=True)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    layer.qkv.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.qkv.weight.grad is None
    assert layer.qkv.bias.grad.isfinite().all()
    (slope,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)
    assert slope.requires_grad


def test_not_where_something_stands_between_projection_and_features(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("folded")

    monkeypatch.setattr(performer, "folded_performer", refuse)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with pytest.raises(AssertionError, match="folded"):
        build()(x)
    build(qk_norm=True, norm_layer=torch.nn.LayerNorm)(x)
    build()(x, attn_mask=torch.ones(2, 1, 1, 9, dtype=torch.bool))
    build()(x, is_causal=True)
    build().to(torch.bfloat16)(x.to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build().float()(x.float())


def test_pays_where_heads_are_wide_or_features_few(monkeypatch):
    monkeypatch.undo()
    tokens = (8, 1025, 128)
    assert folded.pays_folded(tokens, 4, 64, 64, "relu")
    assert folded.pays_folded(tokens, 4, 64, 32, "softmax")
    assert not folded.pays_folded(tokens, 4, 32, 64, "relu")
    assert not folded.pays_folded(tokens, 4, 64, 64, "softmax")
    assert not folded.pays_folded((1, 16, 128), 4, 64, 64, "relu")
