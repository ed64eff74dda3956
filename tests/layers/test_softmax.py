"""Exact attention against timm's module and against the formula."""

import pytest
import timm
import torch
from timm.layers import Attention, LayerNorm, set_fused_attn
from timm.utils import AttentionExtract

from timm_xformers.layers.softmax import SoftmaxAttention, softmax_attention

DTYPES = [pytest.param(torch.float64, 1e-12, id="f64"), pytest.param(torch.float32, 1e-5, id="f32")]


def by_definition(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return weights @ v


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "N", "D"), [(1, 1, 1, 8), (7, 2, 2, 16), (2, 3, 17, 32), (1, 2, 197, 64)]
)
def test_values_and_gradients_match_the_formula(B, H, N, D, dtype, atol):
    rng = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(B, H, N, D, generator=rng, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    fast, slow = softmax_attention(*inputs), by_definition(*inputs)
    upstream = torch.randn(fast.shape, generator=rng, dtype=dtype)
    torch.testing.assert_close(fast, slow, atol=atol, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, inputs, upstream),
        atol=10 * atol,
        rtol=0,
    )


@pytest.mark.parametrize("additive", [False, True])
def test_query_without_keys_gives_zeros(additive):
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 3] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if additive else mask
    out = softmax_attention(q, k, v, attn_mask=given)
    torch.testing.assert_close(out, by_definition(q, k, v, mask), atol=1e-6, rtol=0)
    assert (out[0, :, 3] == 0).all()


@pytest.mark.parametrize("case", ["plain", "masked", "causal"])
def test_module_equals_timm_with_its_weights(case):
    torch.manual_seed(0)
    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "norm_layer": LayerNorm}
    theirs = Attention(32, 4, **options).eval()
    ours = SoftmaxAttention(32, 4, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 17, 32)
    mask = torch.rand(3, 1, 17, 17) > 0.3
    mask = (mask | torch.eye(17, dtype=torch.bool)) if case == "masked" else None
    arguments = {"attn_mask": mask, "is_causal": case == "causal"}
    torch.testing.assert_close(ours(x, **arguments), theirs(x, **arguments))


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"dim=30 is not a multiple of num_heads=4"):
        SoftmaxAttention(30, 4)


def _half(N, S, seed=0):
    rng = torch.Generator().manual_seed(seed)
    sizes = ((2, 2, N, 16), (2, 2, S, 16), (2, 2, S, 16))
    return [torch.randn(*s, generator=rng).bfloat16().requires_grad_() for s in sizes]


@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@pytest.mark.parametrize(("N", "S"), [(17, 17), (5, 196), (196, 5)])
def test_small_maps_trained_in_bfloat16_match_the_formula(N, S, form):
    inputs = _half(N, S)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.rand(2, 1, N, S, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 0, 3] = False  # a query without keys
    given = {"none": None, "bool": mask, "additive": torch.zeros(mask.shape)}[form]
    if form == "additive":
        given = given.masked_fill(~mask, float("-inf"))
    fast = softmax_attention(*inputs, attn_mask=given)
    slow = by_definition(*wide, None if form == "none" else mask)
    assert fast.dtype == torch.bfloat16
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    pairs = [(fast, slow)]
    pairs += zip(
        torch.autograd.grad(fast, inputs, upstream),
        torch.autograd.grad(slow, wide, upstream.double()),
        strict=True,
    )
    for ours, theirs in pairs:
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 0.01  # bfloat16 keeps 8 binary digits: 0.004 a rounding


def test_small_maps_in_bfloat16_drop_what_they_are_told_to():
    inputs = _half(17, 17)
    kept = softmax_attention(*inputs, dropout_p=0.0)
    torch.manual_seed(0)
    drawn = torch.stack([softmax_attention(*inputs, dropout_p=0.5).float() for _ in range(400)])
    assert (drawn[0] != drawn[1]).any()
    spread = drawn.std(dim=0).mean() / 400**0.5
    assert (drawn.mean(dim=0) - kept.float()).abs().mean() < 2 * spread


@pytest.mark.parametrize(
    ("N", "dtype", "trains", "fused"),
    [
        (16, torch.bfloat16, True, False),
        (257, torch.bfloat16, True, False),  # 16 x 16 patches and a class token
        (321, torch.bfloat16, True, True),
        (16, torch.bfloat16, False, True),
        (16, torch.float32, True, True),
    ],
)
def test_the_map_is_formed_only_where_that_is_faster(N, dtype, trains, fused, monkeypatch):
    calls = []
    whole = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs),
    )
    q = torch.randn(1, 1, N, 8, dtype=dtype, requires_grad=trains)
    softmax_attention(q, q, q)
    assert bool(calls) is fused


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("case", ["plain", "bool", "additive", "causal"])
def test_without_fused_attention_the_same_comes_from_the_map(case, unfused):
    q, k, v = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64).unbind(0)
    keep = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[0, 0, 3] = False  # a query without keys
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    given = {"plain": None, "bool": keep, "additive": additive, "causal": None}[case]
    true = {"plain": None, "causal": torch.ones(5, 5, dtype=torch.bool).tril()}.get(case, keep)
    out = softmax_attention(q, k, v, attn_mask=given, is_causal=case == "causal")
    torch.testing.assert_close(out, by_definition(q, k, v, true))
    layer = SoftmaxAttention(16, 2).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    slow = layer(x, attn_mask=given, is_causal=case == "causal")
    set_fused_attn(True)
    torch.testing.assert_close(layer(x, attn_mask=given, is_causal=case == "causal"), slow)


def test_maps_of_exact_attention_are_found(unfused):
    model = timm.create_model("vix_softmax", img_size=8, depth=2, num_classes=3)
    images = torch.randn(2, 3, 8, 8)
    maps = AttentionExtract(model, method="hook")(images)
    assert list(maps) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1)
    (expected,) = AttentionExtract(theirs, method="hook")(torch.randn(2, 3, 32, 32)).values()
    assert expected.dim() == 4
    for weights in maps.values():
        assert weights.shape == (2, 4, 65, 65)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 65))
