"""The fused kernels against sums in float64. Run by test_triton.py, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported: with it, these tests run on the CPU, without it
on a GPU. The definition is written out here once more, with the (N, S) map and without code of the
package; at scales where plain float32 is far from it, plain float32 is the measure.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from timm.layers import set_fused_attn
from torch.nn import functional as F

from timm_xformers.layers.performer import (
    KERNELS,
    PerformerAttention,
    orthogonal_directions,
    performer_attention,
)
from timm_xformers.layers.performer.triton import blocks, choice, fits, fused_performer_attention
from timm_xformers.layers.performer.triton import operators as module

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OPERATOR = "timm_xformers::performer"
# Largest error of values and gradients, in units of the largest number of each.
TOLERANCES = {
    torch.float32: (1e-5, 2e-5),
    torch.float16: (3e-3, 6e-3),
    torch.bfloat16: (2e-2, 4e-2),
}
# B, H, N, S, D, E, m
SMALL = (1, 2, 17, 17, 16, 16, 16)
SHAPES = [
    (2, 1, 1, 1, 16, 16, 16),
    (1, 2, 17, 17, 32, 32, 48),
    pytest.param((2, 3, 197, 197, 64, 64, 64), marks=pytest.mark.slow),
    pytest.param((1, 2, 65, 257, 16, 32, 110), marks=pytest.mark.slow),
    pytest.param((2, 2, 1025, 1025, 64, 64, 64), marks=pytest.mark.slow),
]
# One kernel with exponentials and one without; the others differ from them in a line.
SOME_KERNELS = [
    pytest.param(kernel, marks=() if kernel in ("softmax", "relu") else pytest.mark.slow)
    for kernel in KERNELS
]


def log_features(x, omega, kernel, *, keys):
    x = x * x.shape[-1] ** -0.25
    y = x @ omega.T
    if kernel == "softmax":
        return y - (x * x).sum(-1, keepdim=True) / 2 if keys else y
    if kernel == "exp":
        return y
    phi = {"relu": F.relu, "gelu": F.gelu, "elu": F.elu}[kernel](y)
    return (phi + {"relu": 1e-3, "gelu": 0.171, "elu": 1.001}[kernel]).log()


def quadratic(q, k, v, omega, kernel, bias=None):
    log_q = log_features(q, omega, kernel, keys=False)
    log_k = log_features(k, omega, kernel, keys=True)
    maps = torch.logsumexp(log_q.unsqueeze(-2) + log_k.unsqueeze(-3), dim=-1)  # (B, H, N, S)
    return torch.softmax(maps if bias is None else maps + bias, dim=-1) @ v


def draw(shape, dtype=torch.float32, scale=1.0):
    B, H, N, S, D, E, m = shape
    rng = torch.Generator().manual_seed(0)
    inputs = [
        (scale * torch.randn(B, H, *size, generator=rng)).to(DEVICE, dtype).requires_grad_()
        for size in ((N, D), (S, D), (S, E))
    ]
    upstream = torch.randn(B, H, N, E, generator=rng).to(DEVICE, dtype)
    return inputs, orthogonal_directions(m, D, seed=1).to(DEVICE), upstream


def run(attention, inputs, upstream):
    """The result and the gradients of all inputs, in float64."""
    out = attention(*inputs)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, inputs, upstream))]


def exactly(inputs, omega, upstream, kernel, bias=None):
    wide = [t.detach().double().requires_grad_() for t in inputs]
    return run(
        lambda q, k, v: quadratic(q, k, v, omega.double(), kernel, bias), wide, upstream.double()
    )


@pytest.fixture(autouse=True)
def asked_for():
    set_fused_attn(True, experimental=True)
    yield
    set_fused_attn(True)


def fused(omega, kernel, mask=None):
    return lambda q, k, v: fused_performer_attention(q, k, v, omega, kernel, mask)


def plain(omega, kernel):
    def attention(q, k, v):
        set_fused_attn(False)
        try:
            return performer_attention(q, k, v, omega, kernel)
        finally:
            set_fused_attn(True, experimental=True)

    return attention


def errors(found, expected):
    # Of one token, gradients of queries and keys are zero.
    sizes = [float(tensor.abs().max()) for tensor in expected]
    return [
        float((a - b).abs().max()) / (size if size > 1e-12 else 1.0)
        for a, b, size in zip(found, expected, sizes, strict=True)
    ]


def assert_near(found, expected, dtype):
    values, gradients = TOLERANCES[dtype]
    found = errors(found, expected)
    assert found[0] <= values, found
    assert max(found[1:]) <= gradients, found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32(kernel, shape):
    inputs, omega, upstream = draw(shape)
    found = run(fused(omega, kernel), inputs, upstream)
    assert_near(found, exactly(inputs, omega, upstream, kernel), torch.float32)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kernel", SOME_KERNELS)
def test_half_precision(kernel, dtype):
    inputs, omega, upstream = draw(SMALL, dtype)
    out = fused(omega, kernel)(*inputs)
    assert out.dtype == dtype
    found = run(fused(omega, kernel), inputs, upstream)
    assert_near(found, exactly(inputs, omega, upstream, kernel), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_half_precision_of_long_sequences(kernel, dtype):
    inputs, omega, upstream = draw((1, 2, 4096, 4096, 32, 32, 32), dtype)
    found = run(fused(omega, kernel), inputs, upstream)
    assert all(t.isfinite().all() for t in found)
    # The map of so many tokens is too large: plain float32, which other tests hold to it.
    wide = [t.detach().float().requires_grad_() for t in inputs]
    expected = run(plain(omega, kernel), wide, upstream.float())
    if kernel == "relu":  # at the kink, rounding decides on which side a feature lies
        for index in (0, 1):
            y = inputs[index].detach().double() @ omega.double().T
            far = y.abs().amin(dim=-1) > 1e-4
            assert far.float().mean() > 0.99
            found[index + 1], expected[index + 1] = (
                gradients[index + 1][far] for gradients in (found, expected)
            )
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_odd_lengths_in_several_chunks(kernel):
    inputs, omega, upstream = draw((1, 1, 197, 197, 16, 16, 16))
    assert module._chunks(197, 1, inputs[0].device)[1] > 1
    found = run(fused(omega, kernel), inputs, upstream)
    assert_near(found, exactly(inputs, omega, upstream, kernel), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("m", [16, 32, 64, 128])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_all_sizes(kernel, dtype, D, m, monkeypatch):
    inputs, omega, upstream = draw((1, 2, 130, 130, D, D, m), dtype)
    monkeypatch.setattr(choice, "MIN_TOKENS", 1)
    if not fits(*inputs, omega, None, False):  # layers stay plain there
        assert max(m, D) > 64
        return
    found = run(fused(omega, kernel), inputs, upstream)
    assert_near(found, exactly(inputs, omega, upstream, kernel), dtype)


@pytest.mark.parametrize("scale", [pytest.param(1e-3, marks=pytest.mark.slow), 1e3])
@pytest.mark.parametrize("kernel", SOME_KERNELS)
def test_scales_as_well_as_plain_float32(kernel, scale):
    inputs, omega, upstream = draw(SMALL, scale=scale)
    found = run(fused(omega, kernel), inputs, upstream)
    assert all(t.isfinite().all() for t in found)
    expected = exactly(inputs, omega, upstream, kernel)
    allowed = errors(run(plain(omega, kernel), inputs, upstream), expected)
    for ours, theirs in zip(errors(found, expected), allowed, strict=True):
        # At scale 1e3 exponents are right to a tenth, and both errors are the largest of a few
        # dozen roundings: on a processor with AVX-512 plain float32 once came 4.1 times closer.
        assert ours <= 8 * theirs + 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_stays_finite(kernel, dtype):
    inputs, omega, upstream = draw((1, 2, 70, 70, 16, 16, 16), dtype, scale=1e3)
    found = run(fused(omega, kernel), inputs, upstream / 1e3)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_views_of_a_joint_projection(kernel):
    B, H, N, D = 1, 2, 21, 16
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, N, 3, H, D, generator=rng).to(DEVICE).requires_grad_()
    omega = orthogonal_directions(16, D, seed=1).to(DEVICE)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = fused(omega, kernel)(q, k, v)
    assert out.transpose(1, 2).is_contiguous(), "no copy follows"
    # A gradient without memory of its own: all strides are zero.
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    wide = qkv.detach().double().requires_grad_()
    exact = quadratic(*wide.permute(2, 0, 3, 1, 4).unbind(0), omega.double(), kernel)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    assert_near([out.detach(), gradient], [exact.detach(), expected], torch.float32)
    backwards = q.detach().transpose(-2, -1).contiguous().transpose(-2, -1)
    torch.testing.assert_close(fused(omega, kernel)(backwards, k, v), out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_masked_keys(kernel):
    shape = (3, 1, 9, 70, 16, 16, 16)
    inputs, omega, upstream = draw(shape)
    mask = torch.rand(3, 1, 1, 70, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[-1] = False
    mask = mask.to(DEVICE)
    found = run(fused(omega, kernel, mask), inputs, upstream)
    assert all(t[-1].abs().max() == 0 for t in found), "a query without keys gives zeros"
    assert (found[2].masked_select(~mask.transpose(-2, -1)) == 0).all()
    bias = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf).double()
    some = [t[:-1].detach().requires_grad_() for t in inputs]
    expected = exactly(some, omega, upstream[:-1], kernel, bias[:-1])
    assert_near([t[:-1] for t in found], expected, torch.float32)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_additive_masks_weigh_keys(kernel):
    inputs, omega, upstream = draw((2, 1, 9, 70, 16, 16, 16))
    bias = 3 * torch.randn(1, 1, 1, 70, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = run(fused(omega, kernel, bias), inputs, upstream)
    expected = exactly(inputs, omega, upstream, kernel, bias.double())
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("kernel", ["softmax", pytest.param("elu", marks=pytest.mark.slow)])
def test_bits_repeat_and_depend_on_the_image_alone(kernel):
    inputs, omega, upstream = draw((2, 1, 40, 40, 16, 16, 16))
    first = run(fused(omega, kernel), inputs, upstream)
    others = [t.detach().clone().requires_grad_() for t in inputs]
    for tensor in others:
        tensor.data[1:] *= 50
    beside = run(fused(omega, kernel), others, upstream)
    for a, b in zip(first, beside, strict=True):
        assert torch.equal(a[0], b[0])


def test_tokens_are_cut_in_chunks_where_heads_are_few():
    device = torch.device(DEVICE)
    chunk, splits = module._chunks(1025, 2, device)
    assert splits > 1
    assert chunk % module.BLOCK_TOKENS == 0
    assert chunk * (splits - 1) < 1025 <= chunk * splits
    assert module._chunks(1025, 10**6, device) == (1056, 1)
    assert module._chunks(1, 1, device) == (32, 1)


def test_directions_of_half_precision_are_taken_as_they_are():
    inputs, omega, upstream = draw(SMALL)
    omega = omega.bfloat16()
    found = run(fused(omega, "softmax"), inputs, upstream)
    assert_near(found, exactly(inputs, omega, upstream, "softmax"), torch.float32)


def test_values_may_be_narrower_than_queries():
    (q, k, v), omega, upstream = draw(SMALL)
    inputs = [q, k, v.detach().bfloat16().requires_grad_()]
    found = run(fused(omega, "softmax"), inputs, upstream.bfloat16())
    expected = exactly(inputs, omega, upstream.bfloat16(), "softmax")
    assert_near(found, expected, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_keep_the_rules_of_torch_library():
    inputs, omega, _ = draw((1, 1, 9, 11, 16, 16, 16))
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    bias = torch.zeros(1, 11, device=DEVICE)
    torch.library.opcheck(module._forward, (q, k, v, omega, bias, "softmax"))
    out, state = module._forward(q.detach(), k.detach(), v.detach(), omega, None, "relu")
    grad = torch.ones_like(out)
    given = (grad, q.detach(), k.detach(), v.detach(), omega, None, state, "relu")
    torch.library.opcheck(module._backward, given)


@pytest.fixture
def layer(monkeypatch):
    """A layer that the kernels take at any length."""
    monkeypatch.setattr(choice, "MIN_TOKENS", 1)
    torch.manual_seed(0)
    return PerformerAttention(32, 2, num_features=16).to(DEVICE)


def operators(call):
    """What a call ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_layers_choose_the_kernels_and_timm_can_switch_them_off(layer):
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert OPERATOR in operators(lambda: layer(x))
    assert OPERATOR not in operators(lambda: layer(x, is_causal=True))
    fast = layer(x)
    set_fused_attn(False)
    try:
        assert OPERATOR not in operators(lambda: layer(x))
        torch.testing.assert_close(fast, layer(x), atol=2e-5, rtol=0)
    finally:
        set_fused_attn(True, experimental=True)
    with pytest.raises(ValueError, match=r"never forms the \(N, N\) map"):
        layer(x, attn_mask=torch.ones(17, 17, dtype=torch.bool, device=DEVICE))


def test_short_batches_stay_plain():
    torch.manual_seed(0)
    layer = PerformerAttention(32, 2, num_features=16).to(DEVICE)
    x = torch.randn(2, 17, 32).to(DEVICE)
    assert OPERATOR not in operators(lambda: layer(x))


def test_layers_in_autocast(layer):
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wide = layer(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert OPERATOR in operators(lambda: layer(x))
        narrow = layer(x)
    narrow.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (narrow.float() - wide).norm() / wide.norm() < 0.03


@pytest.mark.slow
def test_compiled_whole(layer):
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = layer(x)
    expected.square().sum().backward()
    gradient = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.qkv.weight.grad, gradient)
    assert OPERATOR in operators(lambda: compiled(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_graphs_that_leave_the_process_are_plain(layer):
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        assert "timm_xformers" not in str(program.graph)
        for made in (program.module(), torch.jit.trace(layer, x), torch.jit.script(layer)):
            assert OPERATOR not in operators(lambda made=made: made(x))
            torch.testing.assert_close(made(x), expected, atol=2e-5, rtol=0)


def test_triton_that_does_not_work_is_reported_once(monkeypatch, caplog):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(blocks, "probe", Broken())
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    choice.shared_memory.cache_clear()
    for _ in range(2):
        assert not choice.shared_memory("cuda", 0)
    choice.shared_memory.cache_clear()
    (message,) = caplog.messages
    assert "does not work (RuntimeError: Failed to find C compiler.)" in message
