"""What the Triton kernels share: blocks of tokens, features, and the two tables of weights.

Everything is in blocks of N tokens and all m features, whose number is padded to a power of two.
"""

# Triton's functions are written in a language of its own, without annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os

import triton
import triton.language as tl

from timm_xformers.layers.linear import FEATURE_EPS

__all__ = [
    "COUNTS",
    "directions",
    "gains",
    "head_of",
    "key_logits",
    "load_norm",
    "load_state",
    "phi",
    "phi_slope",
    "probe",
    "product",
    "project",
    "query_weights",
    "rows_of",
]

_EPS = tl.constexpr(FEATURE_EPS)
# Triton's interpreter cannot compute in bfloat16: there, rounded operands are widened again.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BF16 = tl.constexpr(tl.float32 if _INTERPRETED else tl.bfloat16)
# Numbers that change from batch to batch, for which nothing should be compiled again.
COUNTS = ("H", "N", "S", "chunk", "splits", "bias_b")


@triton.jit
def probe():
    """Nothing, to see whether kernels can be built and started here."""


@triton.jit
def rows_of(x, first, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses (BLOCK, WIDTH) of consecutive rows; whole tensors may pass 2^31 elements."""
    start = x + tl.cast(first, tl.int64) * stride
    return start + tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def head_of(x, row, H, stride_b, stride_h):
    """Address of an image's head, both counted together."""
    return x + (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h


@triton.jit
def directions(projection, m, scale, BLOCK_M: tl.constexpr, D: tl.constexpr):
    """Omega (BLOCK_M, D) in float32, zeros beyond m."""
    real = tl.arange(0, BLOCK_M)[:, None] < m
    omega = tl.load(rows_of(projection, 0, D, BLOCK_M, D), mask=real, other=0.0)
    return omega.to(tl.float32) * scale


@triton.jit
def project(x, omega):
    """Matrix y (N, m) = x omega^T as in float32: exponents need more than three digits."""
    if x.dtype == tl.bfloat16:
        high = omega.to(tl.bfloat16)
        low = (omega - high.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(x.to(_BF16), tl.trans(low.to(_BF16)))
        return tl.dot(x.to(_BF16), tl.trans(high.to(_BF16)), y)
    else:
        return tl.dot(x.to(tl.float32), tl.trans(omega), input_precision="tf32x3")


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Matrix product in bfloat16 or in float32 as tensor cores take it."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16).to(_BF16), b.to(tl.bfloat16).to(_BF16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def phi(y, KERNEL: tl.constexpr):
    """Positive features."""
    if KERNEL == "relu":
        return tl.maximum(y, 0.0) + _EPS
    elif KERNEL == "gelu":  # its minimum is -0.169971
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476)) + (_EPS + 0.17)
    else:
        return tl.where(y > 0.0, y + 1.0, tl.exp(tl.minimum(y, 0.0))) + _EPS


@triton.jit
def phi_slope(y, KERNEL: tl.constexpr):
    """Derivative of `phi`."""
    if KERNEL == "relu":
        return tl.where(y >= 0.0, 1.0, 0.0)
    elif KERNEL == "gelu":
        density = tl.exp(-0.5 * y * y) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(y * 0.7071067811865476)) + y * density
    else:
        return tl.where(y > 0.0, 1.0, tl.exp(tl.minimum(y, 0.0)))


@triton.jit
def key_logits(y, x, gain, scale, KERNEL: tl.constexpr):
    """Matrix b (N, m) from y, the keys and their biases."""
    if KERNEL == "softmax":
        wide = x.to(tl.float32)
        gain = gain - 0.5 * scale * scale * tl.sum(wide * wide, axis=1)
    return y + gain[:, None]


@triton.jit
def gains(bias, tokens, S):
    """Additive bias per key, -inf beyond the last."""
    if bias is None:
        return tl.where(tokens < S, 0.0, float("-inf"))
    else:
        return tl.load(bias + tokens, mask=tokens < S, other=float("-inf"))


@triton.jit
def query_weights(y, norm, KERNEL: tl.constexpr, LOGARITHMIC: tl.constexpr):
    """P (N, m), up to a factor per query."""
    if LOGARITHMIC:
        logits = y + norm[None, :]
        return tl.exp(logits - tl.max(logits, axis=1)[:, None])
    else:
        return phi(y, KERNEL) * norm[None, :]


@triton.jit
def load_state(state, row, m, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Context (BLOCK_M, E) of an image's head."""
    state += row.to(tl.int64) * (m * (E + 1))
    real = tl.arange(0, BLOCK_M)[:, None] < m
    return tl.load(rows_of(state, 0, E, BLOCK_M, E), mask=real, other=0.0)


@triton.jit
def load_norm(state, row, m, beyond, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """What follows the context, (BLOCK_M,), and ``beyond`` for features that do not exist."""
    state += row.to(tl.int64) * (m * (E + 1)) + m * E
    features = tl.arange(0, BLOCK_M)
    return tl.load(state + features, mask=features < m, other=beyond)
