"""Nyström attention against the paper's formula with explicit segments and matrices."""

import pytest
import torch
from torch.nn import functional as F

from timm_xformers.layers.nystrom import (
    HeadConv,
    NystromAttention,
    iterative_pinv,
    nystrom_attention,
    pinv_product,
    segment_means,
)

DTYPES = [pytest.param(torch.float64, 1e-10, id="f64"), pytest.param(torch.float32, 2e-4, id="f32")]


def by_definition(q, k, v, landmarks, steps=6):
    """F A^+ B V per matrix, landmark by landmark, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5
    rows = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            queries, keys, values = q[b, h], k[b, h], v[b, h]
            q_marks = torch.stack([s.mean(0) for s in queries.tensor_split(landmarks)])
            k_marks = torch.stack([s.mean(0) for s in keys.tensor_split(landmarks)])
            left = (queries @ k_marks.T * scale).softmax(-1)
            middle = (q_marks @ k_marks.T * scale).softmax(-1)
            right = (q_marks @ keys.T * scale).softmax(-1)
            eye = torch.eye(landmarks, dtype=torch.float64)
            z = middle.T / (middle.abs().sum(0).max() * middle.abs().sum(1).max())
            for _ in range(steps):
                az = middle @ z
                z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
            rows[b, h] = left @ z @ right @ values
    return rows


def draw(B, H, N, D, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, H, N, D, generator=rng, dtype=dtype, requires_grad=True) for _ in range(3)
    ]


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "N", "D", "landmarks"),
    [
        (1, 1, 2, 8, 1),
        (7, 2, 17, 16, 4),
        (2, 3, 24, 32, 8),
        (2, 2, 197, 64, 16),
        (1, 2, 1025, 32, 64),
    ],
)
def test_values_and_gradients_match_the_formula(B, H, N, D, landmarks, dtype, atol):
    inputs = draw(B, H, N, D, dtype)
    fast = nystrom_attention(*inputs, num_landmarks=landmarks)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    scale = D**-0.5
    torch.testing.assert_close(
        fast.double(), by_definition(*inputs, landmarks).detach(), atol=atol, rtol=1e-3
    )
    # The same formula on whole tensors, for its gradients.
    q, k, v = doubles
    q_marks = torch.stack([s.mean(2) for s in q.tensor_split(landmarks, 2)], 2)
    k_marks = torch.stack([s.mean(2) for s in k.tensor_split(landmarks, 2)], 2)
    middle = (q_marks @ k_marks.mT * scale).softmax(-1)
    slow = (
        (q @ k_marks.mT * scale).softmax(-1)
        @ iterative_pinv(middle, 6)
        @ (q_marks @ k.mT * scale).softmax(-1)
        @ v
    )
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    ours = torch.autograd.grad(fast, inputs, upstream)
    theirs = torch.autograd.grad(slow, doubles, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        size = max(float(b.abs().max()), 1.0)
        torch.testing.assert_close(a.double(), b, atol=20 * atol * size, rtol=1e-3)


@pytest.mark.parametrize("N", [1, 2, 17, 64])
def test_exact_when_there_are_as_many_landmarks_as_tokens(N):
    q, k, v = draw(2, 2, N, 16)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, num_landmarks=64), F.scaled_dot_product_attention(q, k, v)
    )


def test_the_iterated_form_itself_tends_to_exact_attention():
    # One landmark a token, by the formula: what the direct path replaces.
    q, k, v = draw(1, 2, 12, 16)
    near = by_definition(q, k, v, landmarks=12, steps=30)
    torch.testing.assert_close(near, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=0)


def test_error_falls_with_landmarks():
    rng = torch.Generator().manual_seed(0)
    # Neighbours in an image resemble each other; segments of noise would have no landmark.
    walk = torch.randn(3, 1, 4, 128, 16, generator=rng, dtype=torch.float64).cumsum(-2) / 8
    q, k, v = walk.unbind(0)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [
        (nystrom_attention(q, k, v, num_landmarks=n, pinv_steps=12) - exact).norm().item()
        for n in (4, 16, 64)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_pinv_approaches_the_inverse():
    rng = torch.Generator().manual_seed(0)
    a = (torch.randn(3, 16, 16, generator=rng, dtype=torch.float64) * 2).softmax(-1)
    residuals = [
        (a @ iterative_pinv(a, steps) @ a - a).norm().item() / a.norm().item()
        for steps in (2, 6, 20)
    ]
    assert residuals[0] > residuals[1] > residuals[2]
    assert residuals[2] < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("sharpness", [0.02, 0.3, 1.0, 8.0])
def test_product_with_the_inverse_needs_no_inverse(steps, sharpness):
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 64, 64, generator=rng, dtype=torch.float64)
    a = (sharpness * scores).softmax(-1).requires_grad_()
    w = (a.detach() @ torch.randn(4, 64, 32, generator=rng, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(4, 64, 32, generator=rng, dtype=torch.float64)
    exact = iterative_pinv(a, steps) @ w
    product = pinv_product(a, w, steps)
    torch.testing.assert_close(product, exact, atol=1e-11, rtol=1e-9)
    ours = torch.autograd.grad(product, [a, w], upstream)
    theirs = torch.autograd.grad(exact, [a, w], upstream)
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).norm() < 1e-9 * y.norm()
    narrow = pinv_product(a.float(), w.float(), steps).double()
    assert (narrow - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("N", [8, 9, 11, 15, 16, 1025])
def test_segments_differ_by_one_token_at_most(N):
    x = torch.randn(2, N, 3, dtype=torch.float64)
    expected = torch.stack([s.mean(1) for s in x.tensor_split(8, 1)], 1)
    torch.testing.assert_close(segment_means(x, 8), expected)


def test_masked_tokens_change_nothing():
    q, k, v = (t.detach() for t in draw(3, 2, 23, 8))
    mask = torch.ones(3, 1, 1, 23, dtype=torch.bool)
    mask[0, ..., 15:] = False  # whole segments of four landmarks
    mask[1, ..., ::2] = False
    out = nystrom_attention(q, k, v, num_landmarks=8, attn_mask=mask)
    keep = mask.transpose(-2, -1)
    other = [torch.where(keep, t, 50 * torch.randn_like(t)) for t in (q, k, v)]
    changed = nystrom_attention(*other, num_landmarks=8, attn_mask=mask)
    torch.testing.assert_close(out * keep, changed * keep)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(out, nystrom_attention(q, k, v, num_landmarks=8, attn_mask=additive))


def test_mask_of_whole_segments_equals_the_shorter_sequence():
    q, k, v = (t.detach() for t in draw(1, 2, 24, 8))
    mask = torch.ones(1, 1, 1, 24, dtype=torch.bool)
    mask[..., 12:] = False
    out = nystrom_attention(q, k, v, num_landmarks=8, attn_mask=mask)
    short = nystrom_attention(q[:, :, :12], k[:, :, :12], v[:, :, :12], num_landmarks=4)
    torch.testing.assert_close(out[:, :, :12], short)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    mask = torch.tensor([True, False, True, True, True, True, True])[None, None, None]

    def attention(q, k, v):
        return nystrom_attention(q, k, v, num_landmarks=3, attn_mask=mask if masked else None)

    assert torch.autograd.gradcheck(attention, draw(1, 2, 7, 4))


def test_residual_convolution_is_one_filter_per_head():
    torch.manual_seed(0)
    conv = HeadConv(3, 5).double()
    v = torch.randn(2, 3, 11, 4, dtype=torch.float64)
    out = conv(v)
    padded = F.pad(v, (0, 0, 2, 2))
    expected = sum(
        conv.weight[:, 0, i].view(1, 3, 1, 1) * padded[:, :, i : i + 11] for i in range(5)
    )
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        HeadConv(3, 4)


def test_module_adds_the_convolution_and_refuses_causal():
    torch.manual_seed(0)
    layer = NystromAttention(16, 2, num_landmarks=4, conv_kernel=3).double()
    q, k, v = draw(1, 2, 9, 8)
    expected = nystrom_attention(q, k, v, num_landmarks=4) + layer.conv(v)
    torch.testing.assert_close(layer.mix(q, k, v, None, False), expected)
    with pytest.raises(ValueError, match="is_causal=True cannot be honoured"):
        layer(torch.randn(1, 9, 16, dtype=torch.float64), is_causal=True)
    with pytest.raises(ValueError, match="num_landmarks=0"):
        NystromAttention(16, 2, num_landmarks=0)
