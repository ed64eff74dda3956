"""Hedgehog attention against the quadratic sum of its features."""

import pytest
import torch

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.hedgehog import hedgehog_attention


def features(x, weight):
    y = torch.einsum("bhnd,hed->bhne", x, weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


def quadratic(q, k, v, weight_q, weight_k, keep=None):
    weights = features(q, weight_q) @ features(k, weight_k).mT  # (B, H, N, S), built on purpose
    if keep is not None:
        weights = weights * keep
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def draw(B, H, N, S, D, dtype):
    rng = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D), (B, H, S, D), (B, H, S, D), (H, D, D), (H, D, D)]
    return [torch.randn(s, generator=rng, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 8), (7, 3, 17, 17, 8), (2, 2, 5, 197, 16), (1, 2, 197, 197, 64)], ids=str
)
def test_values_and_gradients_are_those_of_the_quadratic_sum(sizes, dtype, atol):
    inputs = draw(*sizes, dtype)
    fast, slow = hedgehog_attention(*inputs), quadratic(*inputs)
    torch.testing.assert_close(fast, slow, atol=atol, rtol=1e-4)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for found, expected in zip(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=20 * atol, rtol=1e-3)


def test_gradcheck():
    assert torch.autograd.gradcheck(hedgehog_attention, draw(1, 2, 3, 4, 2, torch.float64))


@pytest.mark.parametrize("N", [1, 17, 70])
def test_causal_and_masked_sums(N):
    inputs = draw(2, 2, N, N, 8, torch.float64)
    causal = hedgehog_attention(*inputs, is_causal=True)
    torch.testing.assert_close(
        causal, quadratic(*inputs, keep=torch.ones(N, N, dtype=torch.float64).tril())
    )
    keep = torch.rand(2, 1, 1, N, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[..., 0] = True
    torch.testing.assert_close(
        hedgehog_attention(*inputs, attn_mask=keep), quadratic(*inputs, keep=keep)
    )


def test_starts_as_the_identity_with_maps_of_its_own_for_each_head():
    layer = attention_class("hedgehog")(32, 4).double()
    assert layer.state_dict()["hedgehog_q"].shape == (4, 8, 8)
    q, k, v = layer.project(torch.randn(2, 17, 32, dtype=torch.float64))
    eye = torch.eye(8, dtype=torch.float64).expand(4, 8, 8)
    torch.testing.assert_close(layer.mix(q, k, v, None, False), quadratic(q, k, v, eye, eye))
    before = layer.mix(q, k, v, None, False)
    with torch.no_grad():
        layer.hedgehog_k[1] *= 2
    changed = (layer.mix(q, k, v, None, False) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, False]


def test_the_message_names_the_mechanism():
    inputs = draw(2, 2, 5, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="hedgehog attention never forms"):
        hedgehog_attention(*inputs, attn_mask=torch.ones(5, 5, dtype=torch.bool))
