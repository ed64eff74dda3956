"""Performer attention without writing features to memory: the Triton form of `performer`.

Choromanski et al., 2021 (arXiv:2009.14794), as in `timm_xformers.layers.performer`, which defines
the result. Forward reads q, k, v once and writes the output once; backward reads q, k, v and the
output's gradient once and writes three gradients. Beside these there are states of m * (E + 2)
numbers per image, head and chunk of tokens. Between forward and backward nothing is kept but the
inputs and one state.

Operators of `torch.library` rather than an autograd function: the compiler takes them as they are,
without a graph break and without a look at Triton.
"""

from typing import Any

import torch
from torch import Tensor

from timm_xformers.layers.masks import key_bias, key_padding
from timm_xformers.layers.performer.triton.choice import padded

__all__ = ["fused_performer_attention"]

# Tokens of a block, and warps and pipeline stages of a program. Not tuned on a GPU: for an H200 the
# compiler keeps all sizes that `choice` lets through in registers, two programs and more on a
# multiprocessor, but for some bytes of spills in float32. A fixed choice rather than an automatic
# one, by which bits would differ from run to run.
BLOCK_TOKENS = 32
WARPS = 8
STAGES = 1
# Programs wanted on each multiprocessor: with few images and heads, tokens are cut in chunks.
PROGRAMS = 4
# Of a device that is none: two chunks and more in tests.
INTERPRETED_MULTIPROCESSORS = 2


def fused_performer_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str, attn_mask: Tensor | None
) -> Tensor:
    """`performer_attention` by fused kernels, with its arguments but for ``is_causal``.

    Returns:
        (B, H, N, E) in the type of ``v``, token by token in memory.
    """
    bias: Tensor | None = None
    keep = key_padding(attn_mask, "performer")
    if keep is not None and attn_mask is not None:
        bias = key_bias(attn_mask, keep, torch.float32)
        # A constant added to all keys cancels, so the largest weight can be 1.
        bias = bias - bias.amax(dim=-2, keepdim=True).clamp_min(-1e30)
        bias = bias[:, 0, :, 0].expand(q.shape[0], -1)  # (B, S)
    out, _ = _forward(q, k, v, projection, bias, kernel)
    by_head: Tensor = out.transpose(1, 2)
    return by_head


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    m, E = projection.shape[0], v.shape[-1]
    return v.new_empty(B, N, H, E), v.new_empty(B * H, m * (E + 1), dtype=torch.float32)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    state: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    S, E = v.shape[2:]
    return q.new_empty(B, N, H, D), k.new_empty(B, S, H, D), v.new_empty(B, S, H, E)


@torch.library.custom_op(
    "timm_xformers::performer",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? bias, str kernel)"
    " -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, bias: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, E), and state (B * H, m * (E + 1)) for backward."""
    from timm_xformers.layers.performer.triton import forward

    out, state = _outputs(q, k, v, projection, bias, kernel)
    q, k, v, projection = _dense(q), _dense(k), _dense(v), projection.contiguous()
    rows, N, S, m, E = len(state), q.shape[2], v.shape[2], len(projection), v.shape[-1]
    static = _static(q, v, projection, kernel)
    chunk, splits = _chunks(S, rows, q.device)
    sizes = (m, q.shape[-1] ** -0.25)
    partial = state.new_empty(rows, splits, m * (E + 2))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        forward.key_states[rows, splits](
            k, v, projection, bias, partial,
            *_strides(k), *_strides(v), 0 if bias is None else bias.stride(0),
            q.shape[1], S, *sizes, chunk, splits, **static,
        )  # fmt: skip
        forward.merge_states[(rows,)](
            partial, state, m, splits,
            **{name: static[name] for name in ("LOGARITHMIC", "E", "BLOCK_M", "enable_fp_fusion")},
        )  # fmt: skip
        chunk, splits = _chunks(N, rows, q.device)
        forward.mix[rows, splits](
            q, projection, state, out, *_strides(q), *_strides(out.transpose(1, 2)),
            q.shape[1], N, *sizes, chunk, **static,
        )  # fmt: skip
    return out, state


@torch.library.custom_op(
    "timm_xformers::performer_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? bias, "
    "Tensor state, str kernel) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    state: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (B, N, H, D) of q, k and v from that of the output, (B, N, H, E)."""
    from timm_xformers.layers.performer.triton import backward

    dq, dk, dv = _gradients(grad, q, k, v, projection, bias, state, kernel)
    q, k, v, projection = _dense(q), _dense(k), _dense(v), projection.contiguous()
    grad = _dense(grad.transpose(1, 2))  # (B, H, N, E)
    rows, N, S, m, E = len(state), q.shape[2], v.shape[2], len(projection), v.shape[-1]
    static = _static(q, v, projection, kernel)
    chunk, splits = _chunks(N, rows, q.device)
    sizes = (m, q.shape[-1] ** -0.25)
    partial = state.new_empty(rows, splits, m * (E + 1))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        backward.query_grad[rows, splits](
            grad, q, projection, state, dq, partial,
            *_strides(grad), *_strides(q), *_strides(dq.transpose(1, 2)),
            q.shape[1], N, *sizes, chunk, splits, **static,
        )  # fmt: skip
        d_state = partial if splits == 1 else partial.sum(dim=1)
        chunk, splits = _chunks(S, rows, q.device)
        backward.key_grad[rows, splits](
            k, v, projection, bias, state, d_state, dk, dv,
            *_strides(k), *_strides(v), 0 if bias is None else bias.stride(0),
            *_strides(dk.transpose(1, 2)), *_strides(dv.transpose(1, 2)),
            q.shape[1], S, *sizes, chunk, **static,
        )  # fmt: skip
    return dq, dk, dv


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, projection, bias, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, projection, bias, output[1])
    ctx.set_materialize_grads(False)  # the state has no gradient, not one of zeros


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    found = _backward(grad, *ctx.saved_tensors, ctx.kernel)
    return *(gradient.transpose(1, 2) for gradient in found), None, None, None


_forward.register_fake(_outputs)
_backward.register_fake(_gradients)
_forward.register_autograd(_differentiate, setup_context=_keep_inputs)


def _dense(x: Tensor) -> Tensor:
    """The tensor itself, if the numbers of a token and head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of images, heads and tokens in (B, H, N, D)."""
    return x.stride(0), x.stride(1), x.stride(2)


def _ceil(count: int, size: int) -> int:
    return (count + size - 1) // size


def _static(q: Tensor, v: Tensor, projection: Tensor, kernel: str) -> dict[str, Any]:
    """What the kernels are compiled for."""
    if v.dtype == torch.bfloat16:
        precision = "bf16"
    elif v.dtype == torch.float16 or torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"  # holds all digits of float16, and sums that float16 does not
    else:
        precision = "tf32x3"
    D, E = q.shape[-1], v.shape[-1]
    return {
        "KERNEL": kernel,
        "LOGARITHMIC": kernel in ("softmax", "exp"),
        "PRECISION": precision,
        "D": D,
        "E": E,
        "BLOCK_M": padded(len(projection)),
        "BLOCK_N": BLOCK_TOKENS,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "enable_fp_fusion": True,  # the default, of which Triton 3.9 warns
    }


def _chunks(tokens: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a program, and programs per image and head."""
    count = INTERPRETED_MULTIPROCESSORS
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = _ceil(tokens, BLOCK_TOKENS)
    # Two blocks at least, where there are two: every program reads or writes a state.
    splits = max(1, min(_ceil(PROGRAMS * count, rows), blocks // 2))
    chunk = _ceil(blocks, splits) * BLOCK_TOKENS
    return chunk, _ceil(tokens, chunk)
