"""Exact attention against timm's module and against the formula."""

import pytest
import torch
from timm.layers import Attention, LayerNorm

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
