"""Performer attention on a CPU, one head of a few images at a time, with its gradient by hand.

The same sums as `linear.positive_mix` and `linear.exponential_mix`, in another order. There the
features of all heads and images are written to memory, read again several times, and kept for the
gradient: they are the largest tensors of the layer, and fetching them takes longer than computing
them. Here a block of features stays in a core's own cache, and the backward pass draws it up again
from queries and keys, which costs two of its ten products.

Symbols as in `performer`: q and k (N, D), v (N, E), omega (m, D) scaled by D^(-1/4).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.linear import FEATURE_EPS

__all__ = [
    "LOGARITHMIC",
    "blocked_performer",
    "blocks",
    "in_blocks",
    "positive_features",
    "positive_slope",
]

# Rows of a block and thread: 1,024 tokens of 64 features for queries and keys are half a MiB.
BLOCK_TOKENS = 1024
# Features, in elements, below which the calls of the loop cost more than they save.
LEAST_FEATURES = 1 << 19

LOGARITHMIC = ("softmax", "exp")


def in_blocks(x: Tensor, num_elements: int) -> bool:
    """Whether attention without a mask goes in blocks: eager, on a CPU, and large enough.

    ``timm.layers.set_fused_attn(False)`` turns it off, as it does timm's own fused attention; the
    plain order is needed for forward-mode differentiation and for vmap.

    Args:
        x: What comes in.
        num_elements: Features of all queries, B * H * N * m.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch.jit.is_tracing() and use_fused_attn() and num_elements >= LEAST_FEATURES


def blocked_performer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    kernel: str,
    plain: Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor],
) -> Tensor:
    """Performer attention without masks.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        omega: Directions (m, D), scaled by D^(-1/4), in the type of the features.
        kernel: One of `performer.KERNELS`.
        plain: The same of the first five arguments, in operations that PyTorch differentiates:
            used where somebody wants a derivative of the gradient.

    Returns:
        (B, H, N, E) in the type of ``v``, laid out as (B, N, H, E).
    """
    out: Tensor = _Blocked.apply(q, k, v, omega, kernel, plain)[0]  # type: ignore[no-untyped-call]
    return out


class _Blocked(torch.autograd.Function):
    """Values and gradients; the second derivative is that of the plain order."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str, plain: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, H, N, _ = q.shape
        m, width = omega.shape[0], v.shape[-1]
        out = v.new_empty(B, N, H, width).transpose(1, 2)
        # What the gradient wants besides is small beside the features: the state, in a type that
        # holds it, and what normalises it.
        if kernel in LOGARITHMIC:
            forward, state = _exponential, v.new_empty(H, B, m, width)
            norms = omega.new_empty(H, B, m, 1)
        else:
            forward, state = _positive, omega.new_empty(H, B, m, width)
            norms = omega.new_empty(H, B, N, 1)
        for h, images in blocks(H, B, N):
            block = q[images, h], k[images, h], v[images, h]
            out[images, h], state[h, images], norms[h, images] = forward(*block, omega, kernel)
        return out, state, norms

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        q, k, v, omega, ctx.kernel, ctx.plain = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, omega, *output)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", enabled=False):  # as the forward pass had it
            return _gradient(ctx, grad)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, omega, out, state, norms = ctx.saved_tensors
    if torch.is_grad_enabled():  # a derivative of this derivative is wanted
        out = ctx.plain(q, k, v, omega, ctx.kernel)
        wanted = [x for x in (q, k, v) if x.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(grads) if x.requires_grad else None for x in (q, k, v)), None, None, None
    # Laid out as the projections of tokens are, so that what follows need not rearrange it.
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    backward = _exponential_backward if ctx.kernel in LOGARITHMIC else _positive_backward
    for h, images in blocks(q.shape[1], q.shape[0], q.shape[2]):
        block = q[images, h], k[images, h], v[images, h], out[images, h], grad[images, h]
        sums = state[h, images], norms[h, images]
        dq[images, h], dk[images, h], dv[images, h] = backward(
            *block, *sums, omega, ctx.kernel
        )
    return dq, dk, dv, None, None, None


def blocks(num_heads: int, num_images: int, num_tokens: int) -> Iterator[tuple[int, slice]]:
    """Heads, and slices of images that hold about `BLOCK_TOKENS` tokens for each thread."""
    step = max(1, BLOCK_TOKENS * torch.get_num_threads() // max(1, num_tokens))
    for h in range(num_heads):
        for start in range(0, num_images, step):
            yield h, slice(start, start + step)


def positive_features(y: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """phi(y), and the tensor from which its slope is found; may reuse the memory of ``y``."""
    if kernel == "gelu":
        return F.gelu(y).add_(0.17 + FEATURE_EPS), y
    if kernel == "relu":
        phi = y.clamp_min_(0).add_(FEATURE_EPS)
    else:
        phi = F.elu_(y).add_(1 + FEATURE_EPS)
    return phi, phi


def positive_slope(grad: Tensor, known: Tensor, kernel: str) -> Tensor:
    """Gradient of y from that of phi(y); may reuse the memory of ``grad``."""
    if kernel == "gelu":
        return torch.ops.aten.gelu_backward(grad, known)
    if kernel == "relu":
        return torch.ops.aten.threshold_backward(grad, known, FEATURE_EPS)
    # elu' = 1 above zero, where phi > 1 + eps, and exp(y) = phi - eps below.
    return grad.mul_((known - FEATURE_EPS).clamp_max_(1))


def _positive(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One head: (b, N, E), the state (b, m, E), and the normaliser of each query (b, N, 1)."""
    dtype = omega.dtype
    phi_k, _ = positive_features(F.linear(k.to(dtype), omega), kernel)
    state = phi_k.transpose(1, 2) @ v.to(dtype)
    total = phi_k.sum(dim=1).unsqueeze(-1)  # (b, m, 1)
    phi_q, _ = positive_features(F.linear(q.to(dtype), omega), kernel)
    norm = phi_q @ total
    return (phi_q @ state).div_(norm), state, norm


def _positive_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    state: Tensor,
    norm: Tensor,
    omega: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = omega.dtype
    state = state.to(dtype)
    values = v.to(dtype)
    phi_k, slope_k = positive_features(F.linear(k.to(dtype), omega), kernel)
    phi_q, slope_q = positive_features(F.linear(q.to(dtype), omega), kernel)
    total = phi_k.sum(dim=1, keepdim=True)  # (b, 1, m)
    d_sum = grad / norm  # of phi_q @ state
    d_norm = (d_sum * out).sum(dim=-1, keepdim=True).neg_()  # (b, N, 1)
    d_state = phi_q.transpose(1, 2) @ d_sum  # (b, m, E)
    d_total = d_norm.transpose(1, 2) @ phi_q  # (b, 1, m)
    dv = phi_k @ d_state
    d_phi_q = torch.baddbmm(d_norm * total, d_sum, state.transpose(1, 2))
    d_phi_k = torch.baddbmm(d_total, values, d_state.transpose(1, 2))
    dq = positive_slope(d_phi_q, slope_q, kernel) @ omega
    dk = positive_slope(d_phi_k, slope_k, kernel) @ omega
    return dq, dk, dv


def _log_features(q: Tensor, k: Tensor, omega: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Log-features of queries (up to a constant per query) and of keys, (b, N, m) each."""
    log_q, log_k = F.linear(q, omega), F.linear(k, omega)
    if kernel == "softmax":
        log_k -= k.square().sum(dim=-1, keepdim=True).mul_(0.5 * k.shape[-1] ** -0.5)
    return log_q, log_k


def _exponential(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One head: (b, N, E), the state (b, m, E), and L of each feature (b, m, 1)."""
    dtype = omega.dtype
    log_q, log_k = _log_features(q.to(dtype), k.to(dtype), omega, kernel)
    top = log_k.amax(dim=1, keepdim=True)  # (b, 1, m)
    weights = log_k.sub_(top).exp_()
    total = weights.sum(dim=1, keepdim=True)
    if v.dtype == dtype:
        state = (weights.transpose(1, 2) @ v).div_(total.transpose(1, 2))
    else:  # half precision: weights that sum to one keep the product in range
        state = weights.div_(total).to(v.dtype).transpose(1, 2) @ v
    log_total = total.log_().add_(top)
    mixture = log_q.add_(log_total).softmax(dim=-1)
    return mixture.to(v.dtype) @ state, state, log_total.transpose(1, 2)


def _exponential_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    state: Tensor,
    log_total: Tensor,
    omega: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = omega.dtype
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    log_q, log_k = _log_features(wide_q, wide_k, omega, kernel)
    log_total = log_total.transpose(1, 2)  # (b, 1, m)
    mixture = log_q.add_(log_total).softmax(dim=-1)  # rows sum to one
    weights = log_k.sub_(log_total).exp_()  # columns sum to one
    d_state = mixture.to(v.dtype).transpose(1, 2) @ grad  # (b, m, E)
    dv = weights.to(v.dtype) @ d_state
    d_mixture = (grad @ state.transpose(1, 2)).to(dtype)
    d_log_q = torch._softmax_backward_data(d_mixture, mixture, -1, dtype)
    d_weights = (v @ d_state.transpose(1, 2)).to(dtype)
    # L stands beside the queries' features too, and is a logsumexp of the keys'.
    d_log_k = torch._softmax_backward_data(d_weights, weights, 1, dtype)
    d_log_k.addcmul_(weights, d_log_q.sum(dim=1, keepdim=True))
    dk = d_log_k @ omega
    if kernel == "softmax":
        dk -= wide_k * d_log_k.sum(dim=-1, keepdim=True).mul_(k.shape[-1] ** -0.5)
    return d_log_q @ omega, dk, dv
