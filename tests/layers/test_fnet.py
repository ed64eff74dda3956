"""FNet mixing against Fourier matrices."""

import math

import pytest
import torch

from timm_xformers.layers.fnet import FNetMixing, fnet_mixing


def fourier_matrices(size):
    angle = -2 * math.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    return angle.cos() / size**0.5, angle.sin() / size**0.5


def by_definition(x):
    """Real part of W_N x W_C for complex Fourier matrices W = cos + i sin."""
    cos_n, sin_n = fourier_matrices(x.shape[1])
    cos_c, sin_c = fourier_matrices(x.shape[2])
    return cos_n @ x @ cos_c - sin_n @ x @ sin_c


@pytest.mark.parametrize(("B", "N", "C"), [(1, 1, 8), (7, 2, 16), (2, 17, 8), (1, 1025, 64)])
def test_values_and_gradients_match_fourier_matrices(B, N, C):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, C, generator=rng, dtype=torch.float64, requires_grad=True)
    fast, slow = fnet_mixing(x), by_definition(x)
    upstream = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(fast, x, upstream),
        torch.autograd.grad(slow, x, upstream),
        atol=1e-10,
        rtol=0,
    )


def test_gradcheck():
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fnet_mixing, x)


def test_refusals():
    layer = FNetMixing(16)
    with pytest.raises(ValueError, match="cannot apply attn_mask or is_causal"):
        layer(torch.randn(1, 5, 16), is_causal=True)
    with pytest.raises(ValueError, match=r"attn_drop=0.1 cannot be honoured"):
        FNetMixing(16, attn_drop=0.1)
    for other in ({"gated": True}, {"dim_out": 8}):
        with pytest.raises(ValueError, match="gated=True and another dim_out cannot be honoured"):
            FNetMixing(16, **other)
    FNetMixing(16, dim_out=16)
    with pytest.raises(RuntimeError, match="fnet, which has no projections"):
        torch.nn.ModuleDict({"attn": layer}).load_state_dict(
            {"attn.qkv.weight": torch.zeros(48, 16), "attn.proj.weight": torch.zeros(16, 16)}
        )
