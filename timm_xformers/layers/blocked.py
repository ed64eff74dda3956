"""Performer attention on a CPU, a few heads at a time, with its gradient by hand.

The same sums as `linear.positive_mix` in another order. There the features of all images are
written to memory, read again several times, and kept for the gradient: they are the largest tensors
of the layer, and fetching them takes longer than computing them. Here a block of features stays in
the cache, and the backward pass draws it up again from queries and keys, which costs two of its ten
products.

Only for features without exponentials. Those with them (``softmax``, ``exp``) were tried: drawn up
again they were slower than the plain order, and kept they gained nothing in training.

Symbols as in `performer`: q and k (N, D), v (N, E), omega (m, D) scaled by D^(-1/4); a block has h
heads, of one image or of several.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.linear import FEATURE_EPS
from timm_xformers.layers.slices import on_cpu

__all__ = [
    "Plain",
    "blocked_performer",
    "blocks",
    "in_blocks",
    "positive_features",
    "positive_slope",
]

# Tokens of a block, over its heads: 4,096 with 64 features for queries and keys are two MiB.
BLOCK_TOKENS = 4096
# Features, in elements, below which nothing is gained.
LEAST_FEATURES = 1 << 17

Plain = Callable[..., Tensor]


def in_blocks(x: Tensor, num_elements: int) -> bool:
    """Whether attention without a mask goes in blocks: eager, on a CPU, and large enough.

    ``timm.layers.set_fused_attn(False)`` turns it off; the plain order is needed for forward-mode
    differentiation and for vmap.

    Args:
        x: What comes in.
        num_elements: Features of all queries, B * H * N * m.
    """
    return num_elements >= LEAST_FEATURES and on_cpu(x)


def blocks(num_images: int, num_heads: int, num_tokens: int) -> Iterator[slice | tuple[int, slice]]:
    """Slices of images, or of the heads of one image, with about `BLOCK_TOKENS` tokens together."""
    heads = max(1, round(BLOCK_TOKENS / max(1, num_tokens)))
    if heads >= num_heads:
        step = heads // num_heads
        yield from (slice(i, i + step) for i in range(0, num_images, step))
    else:
        for i in range(num_images):
            yield from ((i, slice(h, h + heads)) for h in range(0, num_heads, heads))


def blocked_performer(qkv: Tensor, omega: Tensor, kernel: str, plain: Plain) -> Tensor:
    """Performer attention without masks.

    Args:
        qkv: Queries, keys and values side by side (B, N, 3, H, D), as one projection gives them.
        omega: Directions (m, D), scaled by D^(-1/4), in the type of the features.
        kernel: ``relu``, ``gelu`` or ``elu``.
        plain: The same of queries, keys and values (B, H, N, D), ``omega`` and ``kernel``, in
            operations that PyTorch differentiates: used where somebody wants a derivative of the
            gradient.

    Returns:
        (B, N, H * D), in the type of ``qkv``.
    """
    out: Tensor = _Blocked.apply(qkv, omega, kernel, plain)[0]
    return out


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class _Blocked(torch.autograd.Function):
    """Values and gradients; queries, keys and values share a tensor, and so do their gradients."""

    @staticmethod
    def forward(
        qkv: Tensor, omega: Tensor, kernel: str, plain: Plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _, H, D = qkv.shape
        out = qkv.new_empty(B, N, H, D)
        # What the gradient wants besides is small beside the features. It has their type: sums of
        # features outgrow float16.
        state, norm = omega.new_empty(B, H, omega.shape[0], D), omega.new_empty(B, H, N, 1)
        q, k, v = _heads(qkv)
        for at in blocks(B, H, N):
            found = _mix(_flat(q[at]), _flat(k[at]), _flat(v[at]), omega, kernel)
            for whole, piece in zip((out.transpose(1, 2), state, norm), found, strict=True):
                whole[at] = piece.view(whole[at].shape)
        return out.flatten(2), state, norm

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        qkv, omega, ctx.kernel, ctx.plain = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(qkv, omega, *output)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            return _gradient_plain(ctx, grad), None, None, None
        with torch.autocast("cpu", enabled=False):  # as the forward pass has it
            return _gradient(ctx, grad), None, None, None


def _gradient_plain(ctx: Any, grad: Tensor) -> Tensor:
    qkv, omega, *_ = ctx.saved_tensors
    out = ctx.plain(*_heads(qkv), omega, ctx.kernel).transpose(1, 2).flatten(2)
    found: Tensor = torch.autograd.grad(out, qkv, grad, create_graph=True)[0]
    return found


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    qkv, omega, out, state, norm = ctx.saved_tensors
    B, N, _, H, _ = qkv.shape
    found = torch.empty_like(qkv)
    out, grad = (torch.unflatten(x, -1, (H, -1)).transpose(1, 2) for x in (out, grad))
    for at in blocks(B, H, N):
        given = (_flat(x[at]) for x in (*_heads(qkv), out, grad, state, norm))
        pieces = _mix_backward(omega, ctx.kernel, *given)
        for whole, piece in zip(_heads(found), pieces, strict=True):
            whole[at] = piece.view(whole[at].shape)
    return found


def _flat(x: Tensor) -> Tensor:
    """A block of (h, N, D) as it is, or one of several images (b, H, N, D) as (b * H, N, D)."""
    return x.reshape(-1, *x.shape[-2:])


def positive_features(y: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """phi(y), and the tensor from which its slope is found; may reuse the memory of ``y``."""
    if kernel == "gelu":
        return F.gelu(y).add_(0.17 + FEATURE_EPS), y
    y, shift = (y.clamp_min_(0), 0) if kernel == "relu" else (F.elu_(y), 1)
    phi = y.add_(shift + FEATURE_EPS)
    return phi, phi


def positive_slope(grad: Tensor, known: Tensor, kernel: str) -> Tensor:
    """Gradient of y from that of phi(y); may reuse the memory of ``grad``."""
    if kernel == "gelu":
        found: Tensor = torch.ops.aten.gelu_backward(grad, known)
    elif kernel == "relu":
        found = torch.ops.aten.threshold_backward(grad, known, FEATURE_EPS)
    else:  # elu' = 1 above zero, where phi > 1 + eps, and exp(y) = phi - eps below
        found = grad.mul_((known - FEATURE_EPS).clamp_max_(1))
    return found


def _project(x: Tensor, omega: Tensor) -> Tensor:
    """(h, N, D) to (h, N, m). A batched product reads slices of a joint projection in place."""
    return torch.bmm(x.to(omega.dtype), omega.T.expand(x.shape[0], -1, -1))


def _mix(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed values (h, N, E), the state (h, m, E), and the normaliser of each query (h, N, 1)."""
    phi_k, _ = positive_features(_project(k, omega), kernel)
    state = torch.bmm(phi_k.transpose(1, 2), v.to(omega.dtype))
    total = phi_k.sum(dim=1).unsqueeze(-1)  # (h, m, 1)
    phi_q, _ = positive_features(_project(q, omega), kernel)
    norm = torch.bmm(phi_q, total)
    return torch.bmm(phi_q, state).div_(norm), state, norm


def _mix_backward(
    omega: Tensor,
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    state: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    phi_k, slope_k = positive_features(_project(k, omega), kernel)
    phi_q, slope_q = positive_features(_project(q, omega), kernel)
    total = phi_k.sum(dim=1, keepdim=True)  # (h, 1, m)
    d_sum = grad / norm  # of phi_q @ state
    d_norm = (d_sum * out).sum(dim=-1, keepdim=True).neg_()  # (h, N, 1)
    d_state = torch.bmm(phi_q.transpose(1, 2), d_sum)  # (h, m, E)
    d_total = torch.bmm(d_norm.transpose(1, 2), phi_q)  # (h, 1, m)
    dv = torch.bmm(phi_k, d_state)
    d_phi_q = torch.bmm(d_sum, state.transpose(1, 2)).addcmul_(d_norm, total)
    d_phi_k = torch.bmm(v.to(omega.dtype), d_state.transpose(1, 2)).add_(d_total)
    dq = positive_slope(d_phi_q, slope_q, kernel) @ omega
    dk = positive_slope(d_phi_k, slope_k, kernel) @ omega
    return dq, dk, dv
