"""Triton kernels of `performer`, backward: features are computed again, not read.

In the terms of `forward`, with ``e_i = grad_i . out_i``,

    dC = P^T grad     u_r = sum_i P_ir e_i     d log phi(q)_ir = P_ir (grad_i . C_r - e_i)
    dv = W dC                                  d log phi(k)_jr = W_jr (v_j . dC_r - u_r).

A gradient of a state is one row of memory per image and head: dC (m, E), then u (m).
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
    phi_slope,
    product,
    project,
    query_weights,
    rows_of,
)

__all__ = ["key_grad", "query_grad"]


@triton.jit(do_not_specialize=COUNTS)
def query_grad(
    grad, q, projection, state, dq, partial,
    grad_b, grad_h, grad_n, q_b, q_h, q_n, dq_b, dq_h, dq_n,
    H, N, m, scale, chunk, splits,
    KERNEL: tl.constexpr, LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of queries: their gradient, and their part of dC (m, E) and u (m)."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    grad = head_of(grad, row, H, grad_b, grad_h)
    q = head_of(q, row, H, q_b, q_h)
    dq = head_of(dq, row, H, dq_b, dq_h)
    omega = directions(projection, m, scale, BLOCK_M, D)
    context = load_state(state, row, m, E, BLOCK_M)
    norm = load_norm(state, row, m, float("-inf") if LOGARITHMIC else 0.0, E, BLOCK_M)
    d_context = tl.zeros((BLOCK_M, E), tl.float32)
    u = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, N), BLOCK_N):
        inside = (start + tl.arange(0, BLOCK_N))[:, None] < N
        x = tl.load(rows_of(q, start, q_n, BLOCK_N, D), mask=inside, other=0.0)
        # Zero beyond the last query, hence no part in any sum.
        g = tl.load(rows_of(grad, start, grad_n, BLOCK_N, E), mask=inside, other=0.0)
        y = project(x, omega)
        weights = query_weights(y, norm, KERNEL, LOGARITHMIC)
        factor = 1.0 / tl.maximum(tl.sum(weights, axis=1), 1e-30)
        weights = weights * factor[:, None]
        d_weights = product(g, tl.trans(context), PRECISION)
        e = tl.sum(weights * d_weights, axis=1)
        d_context += product(tl.trans(weights), g, PRECISION)
        u += tl.sum(weights * e[:, None], axis=0)
        if not LOGARITHMIC:
            weights = phi_slope(y, KERNEL) * norm[None, :] * factor[:, None]
        dy = weights * (d_weights - e[:, None])
        dx = product(dy, omega, PRECISION).to(dq.dtype.element_ty)
        tl.store(rows_of(dq, start, dq_n, BLOCK_N, D), dx, mask=inside)
    features = tl.arange(0, BLOCK_M)
    partial += (row.to(tl.int64) * splits + split) * (m * (E + 1))
    tl.store(rows_of(partial, 0, E, BLOCK_M, E), d_context, mask=features[:, None] < m)
    tl.store(partial + m * E + features, u, mask=features < m)


@triton.jit(do_not_specialize=COUNTS)
def key_grad(
    k, v, projection, bias, state, d_state, dk, dv,
    k_b, k_h, k_n, v_b, v_h, v_n, bias_b, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, S, m, scale, chunk,
    KERNEL: tl.constexpr, LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of keys and values: their gradients."""
    row = tl.program_id(0)
    first = tl.program_id(1) * chunk
    k = head_of(k, row, H, k_b, k_h)
    v = head_of(v, row, H, v_b, v_h)
    dk = head_of(dk, row, H, dk_b, dk_h)
    dv = head_of(dv, row, H, dv_b, dv_h)
    if bias is not None:
        bias = bias + (row // H) * bias_b
    omega = directions(projection, m, scale, BLOCK_M, D)
    norm = load_norm(state, row, m, float("inf") if LOGARITHMIC else 1.0, E, BLOCK_M)
    d_context = load_state(d_state, row, m, E, BLOCK_M)
    u = load_norm(d_state, row, m, 0.0, E, BLOCK_M)
    for start in range(first, tl.minimum(first + chunk, S), BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens[:, None] < S
        x = tl.load(rows_of(k, start, k_n, BLOCK_N, D), mask=inside, other=0.0)
        values = tl.load(rows_of(v, start, v_n, BLOCK_N, E), mask=inside, other=0.0)
        y = project(x, omega)
        gain = gains(bias, tokens, S)
        if LOGARITHMIC:
            weights = tl.exp(key_logits(y, x, gain, scale, KERNEL) - norm[None, :])
            slope = weights
        else:
            factor = tl.exp(gain)[:, None] / tl.maximum(norm, 1e-30)[None, :]
            weights = phi(y, KERNEL) * factor
            slope = phi_slope(y, KERNEL) * factor
        d_values = product(weights, d_context, PRECISION).to(dv.dtype.element_ty)
        tl.store(rows_of(dv, start, dv_n, BLOCK_N, E), d_values, mask=inside)
        dy = slope * (product(values, tl.trans(d_context), PRECISION) - u[None, :])
        dx = product(dy, omega, PRECISION)
        if KERNEL == "softmax":
            dx -= x.to(tl.float32) * (scale * scale * tl.sum(dy, axis=1))[:, None]
        dx = dx.to(dk.dtype.element_ty)
        tl.store(rows_of(dk, start, dk_n, BLOCK_N, D), dx, mask=inside)
