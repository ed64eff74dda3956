"""Performer attention against the quadratic sum that it reorders (eq. 4 of the paper)."""

import pytest
import torch
from torch.nn import functional as F

from timm_xformers.layers.performer import (
    KERNELS,
    PerformerAttention,
    orthogonal_directions,
    performer_attention,
    redraw_features,
)
from timm_xformers.layers.performer.learned import LearnedPerformerAttention

DTYPES = [pytest.param(torch.float64, 1e-11, id="f64"), pytest.param(torch.float32, 2e-5, id="f32")]


def features(x, omega, kernel):
    """Phi as the papers write it, without any stabiliser."""
    x = x / x.shape[-1] ** 0.25
    y = x @ omega.T
    if kernel == "softmax":
        return torch.exp(y - (x * x).sum(-1, keepdim=True) / 2)
    return {
        "exp": torch.exp,
        "relu": lambda t: F.relu(t) + 1e-3,
        "gelu": lambda t: F.gelu(t) + 0.171,
        "elu": lambda t: F.elu(t) + 1.001,
    }[kernel](y)


def quadratic(q, k, v, omega, kernel, mask=None):
    """Attention with the (N, S) map, built on purpose, in float64."""
    q, k, v, omega = q.double(), k.double(), v.double(), omega.double()
    weights = features(q, omega, kernel) @ features(k, omega, kernel).transpose(-2, -1)
    if mask is not None:
        weights = weights * mask
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def draw(B, H, N, D, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, H, N, D, generator=rng, dtype=dtype, requires_grad=True) for _ in range(3)
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "N", "D", "m"),
    [
        (1, 1, 1, 8, 16),
        (7, 2, 2, 16, 5),
        (2, 3, 17, 32, 64),
        (7, 2, 197, 64, 32),
        (1, 2, 1025, 32, 64),
    ],
)
def test_values_and_gradients_match_the_quadratic_sum(B, H, N, D, m, dtype, atol, kernel):
    inputs = draw(B, H, N, D, dtype)
    omega = orthogonal_directions(m, D, seed=1).to(dtype)
    fast = performer_attention(*inputs, omega, kernel=kernel)
    slow = quadratic(*inputs, omega, kernel)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.testing.assert_close(fast.double(), slow, atol=atol, rtol=0)
    fast_grads = torch.autograd.grad(fast, inputs, upstream)
    slow_grads = torch.autograd.grad(slow, inputs, upstream.double())
    for ours, theirs in zip(fast_grads, slow_grads, strict=True):
        scale = float(theirs.abs().max()) + 1e-9
        torch.testing.assert_close(
            ours.double(), theirs.double(), atol=20 * atol * max(scale, 1), rtol=0
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_key_padding_equals_leaving_the_keys_out(kernel):
    q, k, v = draw(2, 2, 9, 8, torch.float64)
    omega = orthogonal_directions(16, 8, seed=0).double()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 5:] = False
    out = performer_attention(q, k, v, omega, kernel=kernel, attn_mask=mask)
    short = performer_attention(q[:1], k[:1, :, :5], v[:1, :, :5], omega, kernel=kernel)
    torch.testing.assert_close(out[:1], short)
    full = performer_attention(q[1:], k[1:], v[1:], omega, kernel=kernel)
    torch.testing.assert_close(out[1:], full)


@pytest.mark.parametrize("kernel", KERNELS)
def test_additive_mask_weighs_keys(kernel):
    q, k, v = draw(1, 2, 9, 8, torch.float64)
    omega = orthogonal_directions(16, 8, seed=0).double()
    bias = torch.randn(1, 1, 1, 9, dtype=torch.float64)
    out = performer_attention(q, k, v, omega, kernel=kernel, attn_mask=bias)
    torch.testing.assert_close(out, quadratic(q, k, v, omega, kernel, bias.exp()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("N", [1, 5, 128, 300])
def test_causal_equals_the_triangular_sum(kernel, N):
    inputs = draw(2, 2, N, 8, torch.float64)
    omega = orthogonal_directions(16, 8, seed=0).double()
    fast = performer_attention(*inputs, omega, kernel=kernel, is_causal=True)
    slow = quadratic(*inputs, omega, kernel, torch.ones(N, N, dtype=torch.float64).tril())
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn_like(fast)
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream)
    )


def causal_by_logarithms(log_q, log_k, v):
    """The triangular sum, pair by pair, where no scale can spoil it."""
    pairs = torch.logsumexp(log_q.unsqueeze(-2) + log_k.unsqueeze(-3), dim=-1)  # (B, H, N, N)
    hidden = torch.ones(pairs.shape[-2:], dtype=torch.bool).triu(1)
    return pairs.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("scale", [1e-3, 8, 40, 1e3])
@pytest.mark.parametrize("kernel", ["softmax", "exp"])
@pytest.mark.parametrize("N", [3, 130])
def test_causal_is_right_at_every_scale(N, kernel, scale):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        (size * torch.randn(2, 2, N, 16, generator=rng, dtype=torch.float64)).requires_grad_()
        for size in (scale, scale, 1)
    )
    omega = orthogonal_directions(16, 16, seed=0).double()

    def by_pairs(q, k, v):
        log_q, log_k = q / 2 @ omega.T, k / 2 @ omega.T
        if kernel == "softmax":
            log_k = log_k - (k / 2).square().sum(-1, keepdim=True) / 2
        return causal_by_logarithms(log_q, log_k, v)

    fast = performer_attention(q, k, v, omega, kernel=kernel, is_causal=True)
    slow = by_pairs(q, k, v)
    torch.testing.assert_close(fast[:, :, 0], v[:, :, 0])
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-9)
    upstream = torch.randn(fast.shape, generator=rng, dtype=torch.float64)
    ours = torch.autograd.grad(fast, (q, k, v), upstream)
    theirs = torch.autograd.grad(slow, (q, k, v), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        # Where all weight lies on one token gradients are zero, but for rounding at that scale.
        atol = 1e-8 * float(other.abs().max()) + 1e-13 * max(scale, 1)
        torch.testing.assert_close(mine, other, atol=atol, rtol=1e-6)
    with torch.no_grad():  # and in float32 each result lies within the values that are seen
        narrow = performer_attention(
            q.float(), k.float(), v.float(), omega.float(), kernel, is_causal=True
        )
        seen = v.cummax(dim=2).values.float(), v.cummin(dim=2).values.float()
        assert ((narrow <= seen[0] + 1e-4) & (narrow >= seen[1] - 1e-4)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_with_keys_left_out(kernel):
    q, k, v = draw(2, 2, 9, 8, torch.float64)
    omega = orthogonal_directions(16, 8, seed=0).double()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 0] = False
    mask[1, ..., 4:7] = False
    out = performer_attention(q, k, v, omega, kernel, attn_mask=mask, is_causal=True)
    triangle = torch.ones(9, 9, dtype=torch.float64).tril() * mask
    slow = quadratic(q, k, v, omega, kernel, triangle)
    assert (out[0, :, 0] == 0).all(), "a query without keys gives zeros"
    torch.testing.assert_close(out[:, :, 1:], slow[:, :, 1:])
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][1, :, 4:7] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel, causal):
    omega = orthogonal_directions(6, 4, seed=2).double()
    mask = None if causal else torch.tensor([True, True, False, True, True])[None, None, None]

    def attention(q, k, v):
        return performer_attention(q, k, v, omega, kernel=kernel, attn_mask=mask, is_causal=causal)

    # Away from zero, where relu has a kink.
    assert torch.autograd.gradcheck(attention, draw(1, 2, 5, 4, torch.float64, seed=3))


def test_softmax_kernel_converges_to_exact_attention_like_one_over_root_m():
    q, k, v = (t.detach() for t in draw(1, 4, 64, 16, torch.float64))
    # The features' variance grows like exp(|q' + k'|^2): the rate shows where that is moderate.
    q, k = 0.4 * q, 0.4 * k
    exact = F.scaled_dot_product_attention(q, k, v)
    counts = [64, 256, 1024, 4096]
    errors = []
    for m in counts:
        trials = [
            performer_attention(q, k, v, orthogonal_directions(m, 16, seed).double())
            for seed in range(8)
        ]
        errors.append(torch.stack([(t - exact).pow(2).mean() for t in trials]).mean().sqrt())
    steps = torch.tensor(counts, dtype=torch.float64).log()
    slope = (
        torch.linalg.lstsq(
            torch.stack([steps, torch.ones(4, dtype=torch.float64)], 1),
            torch.stack(errors).log().unsqueeze(1),
        )
        .solution[0]
        .item()
    )
    assert -0.65 < slope < -0.4, f"error falls as m^{slope:.2f}: {errors}"
    assert errors[-1] < 0.01


def test_directions_are_orthogonal_blocks_with_gaussian_norms():
    omega = orthogonal_directions(4096, 16, seed=0)
    assert omega.shape == (4096, 16)
    norms = omega.norm(dim=1)
    gram = omega[:16] / norms[:16, None]
    torch.testing.assert_close(gram @ gram.T, torch.eye(16), atol=1e-5, rtol=0)
    # A chi distribution with 16 degrees of freedom: mean square 16.
    assert abs(float(norms.square().mean()) - 16) < 0.5
    assert norms.std() > 0.5
    torch.testing.assert_close(omega.T @ omega / 4096, torch.eye(16), atol=0.1, rtol=0)
    assert torch.equal(orthogonal_directions(20, 16, seed=0), orthogonal_directions(20, 16, seed=0))
    assert not torch.equal(orthogonal_directions(20, 16, 0), orthogonal_directions(20, 16, 1))


def test_features_are_saved_fixed_and_independent_of_the_global_seed():
    torch.manual_seed(1)
    one = PerformerAttention(32, 4, num_features=16)
    torch.manual_seed(2)
    two = PerformerAttention(32, 4, num_features=16)
    assert torch.equal(one.features, two.features)
    assert "features" in one.state_dict()
    before = one.features.clone()
    one.train()(torch.randn(2, 5, 32))
    assert torch.equal(one.features, before)
    one.redraw(5)
    assert not torch.equal(one.features, before)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.features, two.features)


def test_redraw_features_gives_each_layer_its_own():
    model = torch.nn.Sequential(*[PerformerAttention(16, 2, num_features=8) for _ in range(3)])
    assert torch.equal(model[0].features, model[1].features)
    assert redraw_features(model, seed=4) == 3
    assert not torch.equal(model[0].features, model[1].features)
    assert not torch.equal(model[1].features, model[2].features)


def test_learned_kernel_matches_its_quadratic_sum():
    torch.manual_seed(0)
    layer = LearnedPerformerAttention(16, 2, num_features=8).double()
    q, k, v = draw(2, 2, 9, 8, torch.float64)
    phi_q, phi_k = (layer.feature_net(t / 8**0.25) + 1e-3 for t in (q, k))
    weights = phi_q @ phi_k.transpose(-2, -1)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(layer.mix(q, k, v, None, False), expected)


@pytest.mark.filterwarnings("ignore:torch.*quant")
@pytest.mark.parametrize("change", ["quantised", "no weight", "half"])
def test_learned_kernel_takes_no_type_from_the_projection(change):
    torch.manual_seed(0)
    layer = LearnedPerformerAttention(16, 2, num_features=8).eval()
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    if change == "quantised":
        layer = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
    elif change == "no weight":
        layer.proj = torch.nn.Sequential(layer.proj)
    else:
        layer, x = layer.bfloat16(), x.bfloat16()
    assert layer.mix(*layer.project(x), None, False).dtype == x.dtype
    assert (layer(x) - expected).norm() / expected.norm() < 0.05


def test_refusals():
    with pytest.raises(ValueError, match=r"kernel='cosine' is unknown; choose from softmax, relu"):
        PerformerAttention(16, 2, kernel="cosine")
    with pytest.raises(ValueError, match="num_features=0 must be at least 1"):
        PerformerAttention(16, 2, num_features=0)
    with pytest.raises(ValueError, match=r"attn_drop=0.1 cannot be honoured; use proj_drop"):
        PerformerAttention(16, 2, attn_drop=0.1)
    layer = PerformerAttention(16, 2)
    with pytest.raises(ValueError, match=r"never forms the \(N, N\) map"):
        layer(torch.randn(1, 5, 16), attn_mask=torch.ones(5, 5, dtype=torch.bool))
