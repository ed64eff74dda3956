"""Masks in every spelling, through every mechanism: honoured, or refused in one sentence."""

import pytest
import torch

from timm_xformers.layers.factory import attention_class

NAMES = [
    "softmax",
    "performer_softmax_m32",
    "performer_exp_m32",
    "performer_relu_m32",
    "performer_learned_m32",
    "hedgehog",
    "agent_a16",
    "nystrom_l16",
    "nystrom_l64",
    "nystrom_l16_conv33",
    "linformer_k32",
    "local1d_w16",
    "local2d_w4",
    "local2d_w4_shifted",
    "softmax_dwc",
]
PAIRWISE = ["softmax", *(name for name in NAMES if name.startswith("local"))]
N, H = 50, 4
NEVER = {
    "minus infinity": float("-inf"),
    "lowest": torch.finfo(torch.float32).min,
    "-1e9": -1e9,
    "-1e4": -1e4,
    "-100": -100.0,
}


def build(name, **kwargs):
    torch.manual_seed(0)
    layer = attention_class(name)(32, H, **kwargs).eval()
    if layer.needs_layout:
        layer.set_layout((7, 7), 1, depth=1)
    return layer


def tokens():
    return torch.randn(2, N, 32, generator=torch.Generator().manual_seed(1))


def kept(per_head=False):
    """Which keys count: the first 30 of one image, four of five of the other."""
    keep = torch.ones(2, H if per_head else 1, 1, N, dtype=torch.bool)
    keep[0, ..., 30:] = False
    keep[1, ..., ::5] = False
    if per_head:
        keep[0, 1] = keep[1, 1]
    return keep


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("spelling", NEVER)
@pytest.mark.parametrize("name", NAMES)
def test_every_word_for_never_is_that_of_the_bool_mask(name, spelling, per_head):
    layer, x, keep = build(name), tokens(), kept(per_head)
    additive = torch.zeros(keep.shape).masked_fill(~keep, NEVER[spelling])
    with torch.no_grad():
        expected = layer(x, attn_mask=keep)
        torch.testing.assert_close(layer(x, attn_mask=additive), expected, atol=1e-5, rtol=0)
        # Softmax knows differences only: the same mask, moved as a whole.
        if NEVER[spelling] > -1e9:
            moved = layer(x, attn_mask=additive + 3.0)
            torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)
        assert (layer(x) - expected).abs().max() > 1e-3, "the mask matters"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", NEVER)
@pytest.mark.parametrize("name", NAMES)
def test_in_half_precision_too(name, spelling, dtype):
    layer, x, keep = build(name).to(dtype), tokens().to(dtype), kept()
    additive = torch.zeros(keep.shape).masked_fill(~keep, NEVER[spelling])
    with torch.no_grad():
        expected = layer(x, attn_mask=keep)
        torch.testing.assert_close(layer(x, attn_mask=additive), expected, atol=2e-2, rtol=0)
        additive[1] = NEVER[spelling]  # an image without a key
        assert layer(x, attn_mask=additive).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_heads_with_masks_of_their_own_do_not_see_each_other(name):
    layer, keep = build(name), kept(per_head=True)
    q, k, v = layer.project(tokens())
    with torch.no_grad():
        out = layer.mix(q, k, v, keep, False)
        for head in range(H):
            alone = layer.mix(q, k, v, keep[:, head : head + 1], False)
            torch.testing.assert_close(out[:, head], alone[:, head], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_of_minus_one_weighs_keys_or_is_refused(name):
    layer = build(name).double()
    q, k, v = layer.project(tokens().double())
    bias = torch.zeros(2, 1, 1, N, dtype=torch.float64)
    bias[..., ::3] = -1.0
    if name.startswith("linformer"):
        with pytest.raises(ValueError, match="can leave keys out, but not weigh them"):
            layer.mix(q, k, v, bias, False)
        return
    plain, biased = layer.mix(q, k, v, None, False), layer.mix(q, k, v, bias, False)
    assert (biased - plain).abs().max() > 1e-3, "the bias matters"
    if name in ("softmax", "nystrom_l64"):  # more landmarks than tokens: exact attention
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        torch.testing.assert_close(biased, scores.softmax(-1) @ v)
    if name.startswith(("performer", "hedgehog")):  # a key that counts e^-1 times
        ones = layer.mix(q, k, torch.ones_like(v), bias, False)
        torch.testing.assert_close(ones, torch.ones_like(v))
        weight = bias.exp().transpose(-2, -1)
        total = layer.mix(q, k, weight.expand_as(v), None, False)
        expected = layer.mix(q, k, v * weight, None, False) / total
        torch.testing.assert_close(biased, expected)
    if "conv" not in name:
        constant = layer.mix(q, k, torch.ones_like(v), bias, False)
        assert (constant - 1).abs().max() < 0.05, "weights sum to one"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nystrom_with_a_bias_tends_to_exact_attention(dtype):
    rng = torch.Generator().manual_seed(0)
    walk = torch.randn(3, 1, 4, 128, 16, generator=rng, dtype=torch.float64).cumsum(-2) / 8
    q, k, v = walk.to(dtype).unbind(0)
    bias = 2 * torch.randn(1, 1, 1, 128, generator=rng, dtype=torch.float64).to(dtype)
    exact = (q @ k.mT / 4 + bias).double().softmax(-1) @ v.double()
    errors = []
    for landmarks in (4, 16, 64):
        layer = attention_class("nystrom_l16", num_landmarks=landmarks, pinv_steps=12)(64, 4)
        errors.append((layer.mix(q, k, v, bias, False).double() - exact).norm().item())
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2], errors


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_pairs(name):
    layer, x = build(name), tokens()
    pairs = (torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    if name not in PAIRWISE:
        with pytest.raises(ValueError, match="pass one row for all queries") as refusal:
            layer(x, attn_mask=pairs)
        assert "use_key_only_attn_mask" in str(refusal.value)
        return
    expected = layer(x, attn_mask=pairs.bool())
    for never in NEVER.values():
        additive = torch.zeros(pairs.shape).masked_fill(pairs == 0, never)
        torch.testing.assert_close(layer(x, attn_mask=additive), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_refused(name, dtype):
    with pytest.raises(ValueError, match=r"attn_mask is torch\.\w+; pass bool"):
        build(name)(tokens(), attn_mask=kept().to(dtype))


def test_a_compiled_linformer_asserts_what_it_cannot_honour():
    torch._dynamo.reset()
    layer = torch.compile(build("linformer_k32"), fullgraph=True, backend="eager")
    bias = torch.zeros(2, 1, 1, N)
    bias[0, ..., 40:] = -1e9
    with torch.no_grad():
        layer(tokens(), attn_mask=bias)
        bias[0, ..., :3] = -1.0
        with pytest.raises(RuntimeError, match="not weigh them"):
            layer(tokens(), attn_mask=bias)
