"""Performer attention on a CPU, a few heads at a time, with a gradient written by hand.

The same result as `linear.positive_mix`, computed so that features stay in the cache. There the
features of all images are written to memory, read several times and kept for the gradient: they are
the largest tensors of the layer, and moving them takes longer than computing them. Here a block of
features is used while it is in the cache, and the backward pass computes it again from queries and
keys, two of its ten matrix products.

That is for kernels without exponentials. For the others (``softmax``, ``exp``) computing features
again costs more than reading them: large batches only go through the plain form a few images at a
time.

Symbols as in `performer`: q and k (N, D), v (N, E), omega (m, D) scaled by D^(-1/4); a block has h
heads, of one image or of several.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.linear import FEATURE_EPS

__all__ = ["blocked_performer", "image_by_image", "pays"]

# Tokens of a block, over its heads: 4,096 with 64 features for queries and keys are two MiB.
BLOCK_TOKENS = 4096
# Features of all queries, in numbers, from which blocks are faster: in training, and without a
# gradient, where the plain form keeps nothing.
LEAST_FEATURES = 1 << 17
LEAST_FEATURES_NO_GRAD = 1 << 19
# The same of kernels with exponentials, and features of the images that go together, 4 MiB.
LEAST_EXPONENTIALS = 1 << 23
PIECE_FEATURES = 1 << 20

Plain = Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]


def pays(q: Tensor, num_features: int, exponential: bool) -> bool:
    """Whether blocks are faster than the plain form: eager mode, on a CPU, and large enough.

    Compiled, traced and exported graphs, tensor subclasses, and processes that called
    ``timm.layers.set_fused_attn(False)`` keep the plain form.
    """
    # What is traced has symbols for sizes: it must be ruled out before a size is compared.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return False
    if type(q) is not Tensor or q.device.type != "cpu" or not use_fused_attn():
        return False
    least = LEAST_FEATURES if torch.is_grad_enabled() else LEAST_FEATURES_NO_GRAD
    least = LEAST_EXPONENTIALS if exponential else least
    return q.shape[0] * q.shape[1] * q.shape[2] * num_features >= least


def blocked_performer(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str, plain: Plain
) -> Tensor:
    """Performer attention without masks.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        omega: Directions (m, D), scaled by D^(-1/4), in the type of the features.
        kernel: ``relu``, ``gelu`` or ``elu``.
        plain: The same function of the first five arguments in differentiable operations, for
            derivatives of the gradient and for forward mode.

    Returns:
        (B, H, N, E) in the type of ``v``.
    """
    if torch.is_grad_enabled():
        out: Tensor = _Blocked.apply(q, k, v, omega, kernel, plain)[0]
        return out
    found = _mix_blocks(q, k, v, omega, kernel)
    return _join([mixed[:1] for mixed in found], q)[0].to(v.dtype)


def image_by_image(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str, plain: Plain
) -> Tensor:
    """The plain form of a few images at a time; arguments as in `blocked_performer`."""
    size = max(1, PIECE_FEATURES // max(1, q.shape[1] * q.shape[2] * omega.shape[0]))
    parts = zip(*[torch.split(x, size) for x in (q, k, v)], strict=True)
    with torch.autocast("cpu", enabled=False):  # it would round exponents to three digits
        return torch.cat([plain(a, b, c, omega, kernel) for a, b, c in parts])


def _blocks(x: Tensor) -> Iterator[slice | tuple[int, slice]]:
    """Images, or heads of one image, that have about `BLOCK_TOKENS` tokens together."""
    num_images, num_heads, num_tokens, _ = x.shape
    heads = max(1, round(BLOCK_TOKENS / max(1, num_tokens)))
    if heads >= num_heads:
        step = heads // num_heads
        yield from (slice(i, i + step) for i in range(0, num_images, step))
    else:
        for i in range(num_images):
            yield from ((i, slice(h, h + heads)) for h in range(0, num_heads, heads))


def _one_by_one(
    function: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Rule of ``torch.vmap``: call after call. Each is large enough for blocks of its own."""
    calls = []
    for i in range(info.batch_size):
        picked = (a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
        calls.append(function.apply(*picked))
    out = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return out, (0,) * len(out)


class _Blocked(torch.autograd.Function):
    """Mixed values (B, H, N, E); what the gradient needs besides is small beside the features."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str, plain: Plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, state, norm = _join(_mix_blocks(q, k, v, omega, kernel), q)
        # Sums of features outgrow float16: the other two keep the type of the features.
        return out.to(v.dtype), state, norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.kernel, ctx.plain = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        found = _Gradient.apply(grad, *ctx.saved_tensors, ctx.kernel, ctx.plain)
        return *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        q, k, v, omega, *_ = ctx.saved_tensors
        moved = _push(lambda *x: ctx.plain(*x, omega, ctx.kernel), (q, k, v), tangents[:3])
        return moved, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(_Blocked, info, in_dims, args)


class _Gradient(torch.autograd.Function):
    """Gradients (B, H, N, D) of queries, keys and values."""

    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        omega: Tensor,
        out: Tensor,
        state: Tensor,
        norm: Tensor,
        kernel: str,
        plain: Plain,
    ) -> tuple[Tensor, ...]:
        given = (q, k, v, out, grad, state, norm)
        with torch.autocast("cpu", enabled=False):
            found = [
                _mix_backward(omega, kernel, *(_flat(x[at]) for x in given)) for at in _blocks(q)
            ]
        return tuple(x.to(like.dtype) for x, like in zip(_join(found, q), given, strict=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.kernel, ctx.plain = inputs
        ctx.save_for_backward(*tensors[:5])
        ctx.save_for_forward(*tensors[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, given = _plain_gradient(ctx)
        pull = torch.func.vjp(gradient, *given)[1]
        return *pull(grads), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        gradient, given = _plain_gradient(ctx)
        moved: tuple[Tensor, ...] = _push(gradient, given, tangents[:4])
        return moved

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(_Gradient, info, in_dims, args)


def _plain_gradient(ctx: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The gradient by the plain form, as a function of what it depends on, and these arguments."""
    *given, omega = ctx.saved_tensors

    def gradient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        pull = torch.func.vjp(lambda *x: ctx.plain(*x, omega, ctx.kernel), q, k, v)[1]
        return pull(grad)

    return gradient, tuple(given)


def _push(function: Callable[..., Any], given: tuple[Tensor, ...], tangents: Any) -> Any:
    """Derivative along tangents by two backward passes: forward mode cannot be nested here."""
    along = tuple(
        torch.zeros_like(x) if t is None else t for x, t in zip(given, tangents, strict=True)
    )
    out, pull = torch.func.vjp(function, *given)[:2]
    zeros = torch.zeros_like(out) if isinstance(out, Tensor) else tuple(map(torch.zeros_like, out))
    push = torch.func.vjp(pull, zeros)[1]
    return push(along)[0]


def _join(pieces: Sequence[tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, ...]:
    """Results of all blocks, (h, ...) each, as (B, H, ...). None is written into another."""
    whole = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return tuple(x.reshape(*like.shape[:2], *x.shape[1:]) for x in whole)


def _flat(x: Tensor) -> Tensor:
    """A block of (h, N, D) as it is, or one of several images (b, H, N, D) as (b * H, N, D)."""
    return x.reshape(-1, *x.shape[-2:])


# Nothing below changes a tensor that an operation returned: selective checkpointing may keep it.
def _features(x: Tensor, omega: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """phi(y) of y = x omega^T, (h, N, m), and the tensor from which its slope is found."""
    # A batched product reads slices of a joint projection in place.
    x, turned = x.to(omega.dtype), omega.T.expand(x.shape[0], -1, -1)
    if kernel == "relu":
        # The constant rides on the product: relu(y) + eps = max(y + eps, eps).
        eps = omega.new_full((1, 1, 1), FEATURE_EPS)
        phi = torch.baddbmm(eps, x, turned).clamp_min(FEATURE_EPS)
        return phi, phi
    y = torch.bmm(x, turned)
    if kernel == "gelu":
        return F.gelu(y) + (0.17 + FEATURE_EPS), y
    phi = F.elu(y) + (1 + FEATURE_EPS)
    return phi, phi


def _slope(grad: Tensor, known: Tensor, kernel: str) -> Tensor:
    """Gradient of y from that of phi(y)."""
    if kernel == "gelu":
        found: Tensor = torch.ops.aten.gelu_backward(grad, known)
    elif kernel == "relu":
        found = torch.ops.aten.threshold_backward(grad, known, FEATURE_EPS)
    else:  # elu' = 1 above zero, where phi > 1 + eps, and exp(y) = phi - eps below
        found = grad * (known - FEATURE_EPS).clamp_max(1)
    return found


def _mix_blocks(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`_mix` of all blocks."""
    with torch.autocast("cpu", enabled=False):  # it would sum features in half precision
        return [_mix(_flat(q[at]), _flat(k[at]), _flat(v[at]), omega, kernel) for at in _blocks(q)]


def _mix(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed values (h, N, E), the state (h, m, E), and the normaliser of each query (h, N, 1)."""
    phi = _features(k, omega, kernel)[0]
    total = phi.sum(dim=1).unsqueeze(-1)  # (h, m, 1)
    # Queries meet the sum of keys as one more column of the state, not in a product of its own.
    state = torch.cat([torch.bmm(phi.transpose(1, 2), v.to(omega.dtype)), total], dim=-1)
    del phi  # its memory, still in the cache, is that of the queries' features
    mixed = torch.bmm(_features(q, omega, kernel)[0], state)
    norm = mixed[..., -1:]
    return mixed[..., :-1] / norm, state[..., :-1], norm


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
    phi_k, slope_k = _features(k, omega, kernel)
    phi_q, slope_q = _features(q, omega, kernel)
    total = phi_k.sum(dim=1, keepdim=True)  # (h, 1, m)
    d_sum = grad / norm  # of phi_q @ state
    d_norm = -(d_sum * out).sum(dim=-1, keepdim=True)  # (h, N, 1)
    d_state = torch.bmm(phi_q.transpose(1, 2), d_sum)  # (h, m, E)
    d_total = torch.bmm(d_norm.transpose(1, 2), phi_q)  # (h, 1, m)
    dv = torch.bmm(phi_k, d_state)
    d_phi_q = torch.baddbmm(d_norm * total, d_sum, state.transpose(1, 2))
    d_phi_k = torch.baddbmm(d_total, v.to(omega.dtype), d_state.transpose(1, 2))
    dq = _slope(d_phi_q, slope_q, kernel) @ omega
    dk = _slope(d_phi_k, slope_k, kernel) @ omega
    return dq, dk, dv
