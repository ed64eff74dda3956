"""Linformer attention against its formula, and the lengths it serves."""

import pytest
import torch
from torch.nn import functional as F

from timm_xformers.layers.linformer import (
    LinformerAttention,
    fit_length,
    linformer_attention,
    resample_projection,
)

DTYPES = [pytest.param(torch.float64, 1e-12, id="f64"), pytest.param(torch.float32, 2e-5, id="f32")]


def by_definition(q, k, v, e, f):
    q, k, v, e, f = (t.double() for t in (q, k, v, e, f))
    keys = torch.einsum("kn,bhnd->bhkd", e, k)
    values = torch.einsum("kn,bhnd->bhkd", f, v)
    scores = torch.einsum("bhnd,bhkd->bhnk", q, keys) / q.shape[-1] ** 0.5
    return torch.einsum("bhnk,bhkd->bhnd", scores.softmax(-1), values)


def draw(B, H, N, D, dtype=torch.float64, kv_heads=None):
    rng = torch.Generator().manual_seed(0)
    heads = (H, kv_heads or H, kv_heads or H)
    return [torch.randn(B, h, N, D, generator=rng, dtype=dtype, requires_grad=True) for h in heads]


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "N", "D", "k_len"),
    [
        (1, 1, 1, 8, 4),
        (7, 2, 2, 16, 2),
        (2, 3, 17, 32, 5),
        (7, 2, 197, 64, 32),
        (1, 2, 1025, 32, 64),
    ],
)
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_values_and_gradients_match_the_formula(B, H, N, D, k_len, dtype, atol, one_kv_head):
    inputs = draw(B, H, N, D, dtype, kv_heads=1 if one_kv_head else None)
    e, f = (torch.randn(k_len, N, dtype=dtype, requires_grad=True) for _ in range(2))
    with torch.no_grad():  # of the size of a trained projection
        e /= N**0.5
        f /= N**0.5
    inputs += [e, f]
    fast, slow = linformer_attention(*inputs), by_definition(*inputs)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.testing.assert_close(fast.double(), slow, atol=atol, rtol=0)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, inputs, upstream.double()),
        strict=True,
    ):
        size = max(float(b.abs().max()), 1.0)
        torch.testing.assert_close(a.double(), b.double(), atol=10 * atol * size, rtol=0)


@pytest.mark.parametrize("N", [1, 2, 17, 197])
def test_exact_when_the_projection_is_the_identity(N):
    q, k, v = draw(2, 2, N, 16)
    eye = torch.eye(N, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, eye, eye), exact)


def test_initial_projection_is_means_and_the_identity_at_full_length():
    layer = LinformerAttention(16, 2, proj_len=4)
    layer.set_layout((2, 4), 0)
    expected = torch.kron(torch.eye(4), torch.full((1, 2), 0.5))
    torch.testing.assert_close(layer.proj_k.detach(), expected)
    full = LinformerAttention(16, 2, proj_len=9)
    full.set_layout((2, 4), 1)
    torch.testing.assert_close(full.proj_v.detach(), torch.eye(9))


def test_error_falls_with_projected_length():
    rng = torch.Generator().manual_seed(0)
    walk = torch.randn(3, 1, 4, 128, 16, generator=rng, dtype=torch.float64).cumsum(-2) / 8
    q, k, v = walk.unbind(0)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for k_len in (8, 32, 128):
        layer = LinformerAttention(64, 4, proj_len=k_len).double()
        layer.set_layout((1, 128), 0)
        errors.append((layer.mix(q, k, v, None, False) - exact).norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 1e-10


def test_masked_tokens_change_nothing_and_identity_stays_exact():
    q, k, v = (t.detach() for t in draw(2, 2, 12, 8))
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[0, ..., 7:] = False
    keep = mask.transpose(-2, -1)
    eye = torch.eye(12, dtype=torch.float64)
    out = linformer_attention(q, k, v, eye, eye, attn_mask=mask)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, exact)
    e = torch.randn(4, 12, dtype=torch.float64)
    out = linformer_attention(q, k, v, e, e, attn_mask=mask)
    k2, v2 = (torch.where(keep, t, 50 * torch.randn_like(t)) for t in (k, v))
    torch.testing.assert_close(out, linformer_attention(q, k2, v2, e, e, attn_mask=mask))


def test_serves_any_length_until_told_one_then_only_that():
    torch.manual_seed(0)
    layer = LinformerAttention(16, 2, proj_len=8)
    for N in (5, 65, 197, 256, 300):
        assert layer(torch.randn(1, N, 16)).shape == (1, N, 16)
    layer.set_layout((8, 8), 1)
    assert layer(torch.randn(1, 65, 16)).shape == (1, 65, 16)
    with pytest.raises(ValueError, match=r"for 65 tokens and got 197; use that many"):
        layer(torch.randn(1, 197, 16))


@pytest.mark.parametrize("N", [64, 500])
def test_sampled_projection_keeps_the_weight_of_each_slot(N):
    layer = LinformerAttention(16, 2, proj_len=8)
    sampled = fit_length(layer.proj_k, N)
    assert sampled.shape == (8, N)
    torch.testing.assert_close(sampled.sum(1), torch.ones(8), atol=2e-2, rtol=0)


def test_change_of_grid_interpolates_and_keeps_the_weight_of_each_slot():
    layer = LinformerAttention(16, 2, proj_len=4)
    layer.set_layout((8, 8), 1)
    with torch.no_grad():
        layer.proj_k.uniform_(0.5, 1.0)
    before = layer.proj_k.detach().clone()
    layer.set_layout((16, 16), 1)
    assert layer.proj_k.shape == (4, 257)
    assert torch.equal(layer.proj_k[:, :1], before[:, :1])
    torch.testing.assert_close(layer.proj_k[:, 1:].sum(1), before[:, 1:].sum(1), atol=0, rtol=2e-2)
    same = resample_projection(before, (8, 8), (8, 8), 1)
    torch.testing.assert_close(same, before)


@pytest.mark.parametrize(
    ("options", "width", "projections"),
    [
        ({}, 3 * 32, 2),
        ({"one_kv_head": True}, 32 + 2 * 8, 2),
        ({"share_kv": True}, 32 + 32, 1),
        ({"one_kv_head": True, "share_kv": True}, 32 + 8, 1),
    ],
)
def test_shared_heads_and_projections_shrink_the_layer(options, width, projections):
    torch.manual_seed(0)
    layer = LinformerAttention(32, 4, proj_len=4, **options)
    layer.set_layout((3, 3), 0)
    assert layer.qkv.out_features == width
    assert sum(p is not None for p in (layer.proj_k, layer.proj_v)) == projections
    x = torch.randn(2, 9, 32)
    layer(x).sum().backward()
    q, k, v = layer.split(x)
    f = layer.proj_k if layer.proj_v is None else layer.proj_v
    expected = by_definition(q, *(t.expand(-1, 4, -1, -1) for t in (k, v)), layer.proj_k, f)
    torch.testing.assert_close(
        layer.mix(q, k, v, None, False).double(), expected, atol=1e-5, rtol=0
    )


def test_gradcheck():
    e, f = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True).unbind(0)
    mask = torch.tensor([True, False, True, True, True, True, True])[None, None, None]

    def attention(q, k, v, e, f):
        return linformer_attention(q, k, v, e, f, attn_mask=mask)

    assert torch.autograd.gradcheck(attention, [*draw(1, 2, 7, 4), e, f])


def test_refusals():
    with pytest.raises(ValueError, match="proj_len=0 must be at least 1"):
        LinformerAttention(16, 2, proj_len=0)
    with pytest.raises(ValueError, match="is_causal=True cannot be honoured"):
        LinformerAttention(16, 2)(torch.randn(1, 9, 16), is_causal=True)


@pytest.mark.parametrize("share_kv", [False, True])
def test_telling_the_grid_keeps_what_was_trained(share_kv):
    torch.manual_seed(0)
    layer = LinformerAttention(16, 2, proj_len=8, share_kv=share_kv).eval()
    with torch.no_grad():
        layer.proj_k += 0.1 * torch.randn_like(layer.proj_k)
    x = torch.randn(2, 65, 16)
    before = layer(x)
    layer.proj_k.requires_grad_(False)
    layer.set_layout((8, 8), 1)
    torch.testing.assert_close(layer(x), before)
    assert layer.proj_k.shape == (8, 65)
    assert not layer.proj_k.requires_grad


@pytest.mark.parametrize("told", ["saved", "loaded", "both", "neither"])
def test_checkpoints_load_whether_the_grid_was_told_or_not(told):
    torch.manual_seed(0)
    saved, loaded = (LinformerAttention(16, 2, proj_len=8).eval() for _ in range(2))
    if told in ("saved", "both"):
        saved.set_layout((8, 8), 1)
    if told in ("loaded", "both"):
        loaded.set_layout((8, 8), 1)
    with torch.no_grad():
        saved.proj_k += 0.1 * torch.randn_like(saved.proj_k)
        saved.proj_v += 0.1 * torch.randn_like(saved.proj_v)
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(2, 65, 16)
    torch.testing.assert_close(loaded(x), saved(x))
    loaded.set_layout((8, 8), 1)
    torch.testing.assert_close(loaded(x), saved(x))


def test_a_projection_of_another_length_or_number_of_slots_is_refused():
    layer = LinformerAttention(16, 2, proj_len=8)
    layer.set_layout((8, 8), 1)
    other = LinformerAttention(16, 2, proj_len=8)
    other.set_layout((9, 9), 1)
    with pytest.raises(RuntimeError, match="size mismatch for proj_k"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for proj_k"):
        layer.load_state_dict(LinformerAttention(16, 2, proj_len=4).state_dict())
