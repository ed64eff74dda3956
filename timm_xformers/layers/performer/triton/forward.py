"""Triton kernels of `performer`, forward: no features in memory, only states of all tokens.

Both kinds of features come down to two tables of convex weights (see `linear`): with
y = x' Omega^T, ``W_jr`` weighs keys within a feature and ``P_ir`` features within a query,

    exponentials (softmax, exp)             W_jr = exp(b_jr - n_r)     P_ir = softmax_r(y_ir + n_r)
    positive (relu, gelu, elu)              W_jr = phi(y_jr) / n_r     P_ir ~ phi(y_ir) n_r

where b_jr is y_jr, less |k'_j|^2 / 2 for softmax, plus the key's bias, and n_r is the logarithm of
the sum of exp(b_jr) over keys, or the sum of phi. Then ``C = W^T v`` and ``out = P C``.

A state is one row of memory per image and head: C (m, E), then n (m). Everything is summed in
float32, in an order that depends on shapes and on the number of multiprocessors alone.
"""

# Triton's functions are written in a language of its own, without annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from timm_xformers.layers.performer.triton.blocks import (
    COUNTS,
    directions,
    gains,
    head_of,
    key_logits,
    load_norm,
    load_state,
    phi,
    product,
    project,
    query_weights,
    rows_of,
)

__all__ = ["key_states", "merge_states", "mix"]


@triton.jit(do_not_specialize=COUNTS)
def key_states(
    k, v, projection, bias, partial,
    k_b, k_h, k_n, v_b, v_h, v_n, bias_b,
    H, S, m, scale, chunk, splits,
    KERNEL: tl.constexpr, LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys: W^T v (m, E) and sums (m) relative to maxima (m), of its own."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    k = head_of(k, row, H, k_b, k_h)
    v = head_of(v, row, H, v_b, v_h)
    if bias is not None:
        bias = bias + (row // H) * bias_b
    omega = directions(projection, m, scale, BLOCK_M, D)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that no key at all gives weights of 0
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, E), tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, S), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens[:, None] < S
        x = tl.load(rows_of(k, start, k_n, BLOCK_N, D), mask=inside, other=0.0)
        values = tl.load(rows_of(v, start, v_n, BLOCK_N, E), mask=inside, other=0.0)
        y = project(x, omega)
        gain = gains(bias, tokens, S)
        if LOGARITHMIC:
            y = key_logits(y, x, gain, scale, KERNEL)
            higher = tl.maximum(top, tl.max(y, axis=0))
            decay = tl.exp(top - higher)
            weights = tl.exp(y - higher[None, :])
            top = higher
            total = total * decay
            context = context * decay[:, None]
        else:
            weights = phi(y, KERNEL) * tl.exp(gain)[:, None]
        total += tl.sum(weights, axis=0)
        context += product(tl.trans(weights), values, PRECISION)
    features = tl.arange(0, BLOCK_M)
    partial += (row.to(tl.int64) * splits + split) * (m * (E + 2))
    tl.store(rows_of(partial, 0, E, BLOCK_M, E), context, mask=features[:, None] < m)
    tl.store(partial + m * E + features, total, mask=features < m)
    tl.store(partial + m * (E + 1) + features, top, mask=features < m)


@triton.jit(do_not_specialize=COUNTS)
def merge_states(
    partial, state, m, splits,
    LOGARITHMIC: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The state of all keys from those of the chunks, in their order."""
    row = tl.program_id(0)
    features = tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, E), tl.float32)
    partial += row.to(tl.int64) * splits * (m * (E + 2))
    for _ in range(splits):
        part = tl.load(rows_of(partial, 0, E, BLOCK_M, E), mask=features[:, None] < m, other=0.0)
        other = tl.load(partial + m * (E + 1) + features, mask=features < m, other=-1e30)
        higher = tl.maximum(top, other)
        decay = tl.exp(top - higher)
        share = tl.exp(other - higher)
        total = total * decay + share * tl.load(
            partial + m * E + features, mask=features < m, other=0.0
        )
        context = context * decay[:, None] + share[:, None] * part
        top = higher
        partial += m * (E + 2)
    if LOGARITHMIC:
        total = tl.maximum(total, 0.5)  # the largest weight is 1, if there is a key
        norm = top + tl.log(total)
    else:
        norm = total
        total = tl.maximum(total, 1e-30)
    state += row.to(tl.int64) * (m * (E + 1))
    context = context / total[:, None]
    tl.store(rows_of(state, 0, E, BLOCK_M, E), context, mask=features[:, None] < m)
    tl.store(state + m * E + features, norm, mask=features < m)


@triton.jit(do_not_specialize=COUNTS)
def mix(
    q, projection, state, out,
    q_b, q_h, q_n, out_b, out_h, out_n,
    H, N, m, scale, chunk,
    KERNEL: tl.constexpr, LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of queries: out = P C."""
    row = tl.program_id(0)
    first = tl.program_id(1) * chunk
    q = head_of(q, row, H, q_b, q_h)
    out = head_of(out, row, H, out_b, out_h)
    omega = directions(projection, m, scale, BLOCK_M, D)
    context = load_state(state, row, m, E, BLOCK_M)
    norm = load_norm(state, row, m, float("-inf") if LOGARITHMIC else 0.0, E, BLOCK_M)
    for start in range(first, tl.minimum(first + chunk, N), BLOCK_N):
        inside = (start + tl.arange(0, BLOCK_N))[:, None] < N
        x = tl.load(rows_of(q, start, q_n, BLOCK_N, D), mask=inside, other=0.0)
        weights = query_weights(project(x, omega), norm, KERNEL, LOGARITHMIC)
        mixed = product(weights, context, PRECISION)
        mixed = mixed / tl.maximum(tl.sum(weights, axis=1), 1e-30)[:, None]
        mixed = mixed.to(out.dtype.element_ty)
        tl.store(rows_of(out, start, out_n, BLOCK_N, E), mixed, mask=inside)
