"""Performer attention on a CPU whose features are taken from tokens, not from queries and keys.

A feature is a dot product with a query or key, which is a linear map of a token: so it is a dot
product with the token, by a vector of C numbers that is known beforehand. Values are linear in
tokens too, and the sum over keys can be formed of tokens and projected then. Queries, keys and
values are never there, and where heads are wide or features few that is less work (`pays_folded`):
per token and head 3 m C + m D products instead of 3 C D + 4 m D.

Blocks and the gradient by hand are those of `blocked`, with tokens x (N, C) in place of q, k and v.
The softmax kernel needs a key's norm, hence the keys, for that alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.blocked import LOGARITHMIC, blocks, positive_features, positive_slope

__all__ = ["folded_performer", "pays_folded"]

# The two orders are compared by products; the folded one starts more of them.
LEAST_GAIN = 1.3


def pays_folded(
    shape: tuple[int, int, int], num_heads: int, head_dim: int, num_features: int, kernel: str
) -> bool:
    """Whether tokens to features is clearly less work than tokens to queries to features.

    Args:
        shape: Of the tokens (B, N, C).
        num_heads: Number of heads H.
        head_dim: Width D of a head.
        num_features: m.
        kernel: One of `performer.KERNELS`.
    """
    B, N, C = shape
    D, m = head_dim, num_features
    plain = B * N * (3 * C * D + 4 * D * m)
    folded = B * N * (3 * m * C + m * D + (C * D if kernel == "softmax" else 0))
    folded += 2 * m * D * C + B * m * C * D  # folding the weights, projecting the sums
    return plain >= LEAST_GAIN * folded


def folded_performer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    omega: Tensor,
    kernel: str,
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Performer attention of tokens without masks, before the output projection.

    Args:
        x: Tokens (B, N, C).
        weight: Joint projection to queries, keys and values (3 * H * D, C).
        bias: Its bias (3 * H * D), if it has one.
        omega: Directions (m, D), scaled by D^(-1/4).
        kernel: One of `performer.KERNELS`.
        plain: The same of the first three arguments, in operations that PyTorch differentiates:
            used where somebody wants a derivative of the gradient.

    Returns:
        (B, N, H * D).
    """
    out: Tensor = _Folded.apply(x, weight, bias, omega, kernel, plain)[0]  # type: ignore[no-untyped-call]
    return out


class _Folded(torch.autograd.Function):
    """Values, and gradients of tokens, weight and bias."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        omega: Tensor,
        kernel: str,
        plain: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps = _Maps(weight, bias, omega, kernel)
        B, N, C = x.shape
        H, D, m = maps.num_heads, omega.shape[1], omega.shape[0]
        out = x.new_empty(B, N, H * D)
        state = x.new_empty(H, B, m, C)
        logarithmic = kernel in LOGARITHMIC
        norms = x.new_empty(H, B, 1, m) if logarithmic else x.new_empty(H, B, N, 1)
        for h, images in blocks(H, B, N):
            tokens, own = x[images], out[images, :, h * D : (h + 1) * D]
            y_q, y_k = maps.features(tokens, h)
            if logarithmic:
                top = y_k.amax(dim=1, keepdim=True)  # (b, 1, m)
                weights = y_k.sub_(top).exp_()
                total = weights.sum(dim=1, keepdim=True)
                sums = (weights.transpose(1, 2) @ tokens).div_(total.transpose(1, 2))
                norm = total.log_().add_(top)
                mixture = y_q.add_(norm).softmax(dim=-1)
                own.copy_(mixture @ maps.values(sums, h, None))
            else:
                phi_q, phi_k = positive_features(y_q, kernel)[0], positive_features(y_k, kernel)[0]
                sums = phi_k.transpose(1, 2) @ tokens  # (b, m, C)
                total = phi_k.sum(dim=1).unsqueeze(-1)  # (b, m, 1)
                norm = phi_q @ total  # (b, N, 1)
                torch.div(phi_q @ maps.values(sums, h, total), norm, out=own)
            state[h, images], norms[h, images] = sums, norm
        return out, state, norms

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, weight, bias, omega, ctx.kernel, ctx.plain = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, omega, *output)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", enabled=False):
            return *_gradient(ctx, grad), None, None, None


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, omega, out, state, norms = ctx.saved_tensors
    kernel = ctx.kernel
    if torch.is_grad_enabled():  # a derivative of this derivative is wanted
        given = (x, weight, bias)
        wanted = [t for t in given if t is not None and t.requires_grad]
        again = ctx.plain(*given)
        grads = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
        return tuple(next(grads) if t is not None and t.requires_grad else None for t in given)
    maps = _Maps(weight, bias, omega, kernel)
    D = omega.shape[1]
    dx = torch.zeros_like(x)
    for h, images in blocks(maps.num_heads, *x.shape[:2]):
        tokens, sums, norm = x[images], state[h, images], norms[h, images]
        heads = slice(h * D, (h + 1) * D)
        g, mixed = grad[images, :, heads], out[images, :, heads]
        y_q, y_k = maps.features(tokens, h)
        if kernel in LOGARITHMIC:
            mixture = y_q.add_(norm).softmax(dim=-1)
            weights = y_k.sub_(norm).exp_()
            d_values = mixture.transpose(1, 2) @ g  # (b, m, D)
            d_mixture = g @ maps.values(sums, h, None).transpose(1, 2)
            d_q = torch._softmax_backward_data(d_mixture, mixture, -1, x.dtype)
            d_sums, _ = maps.values_backward(d_values, sums, h, None)
            d_weights = tokens @ d_sums.transpose(1, 2)
            d_k = torch._softmax_backward_data(d_weights, weights, 1, x.dtype)
            d_k.addcmul_(weights, d_q.sum(dim=1, keepdim=True))
        else:
            phi_q, slope_q = positive_features(y_q, kernel)
            weights, slope_k = positive_features(y_k, kernel)
            total = weights.sum(dim=1, keepdim=True)  # (b, 1, m)
            column = total.transpose(1, 2)
            d_mixed = g / norm
            d_norm = (d_mixed * mixed).sum(dim=-1, keepdim=True).neg_()  # (b, N, 1)
            d_values = phi_q.transpose(1, 2) @ d_mixed
            context = maps.values(sums, h, column)
            d_phi_q = torch.baddbmm(d_norm * total, d_mixed, context.transpose(1, 2))
            d_sums, d_total = maps.values_backward(d_values, sums, h, column)
            d_total = (d_total + phi_q.transpose(1, 2) @ d_norm).transpose(1, 2)  # (b, 1, m)
            d_phi_k = torch.baddbmm(d_total, tokens, d_sums.transpose(1, 2))
            d_q = positive_slope(d_phi_q, slope_q, kernel)
            d_k = positive_slope(d_phi_k, slope_k, kernel)
        own = dx[images]
        own += weights @ d_sums
        maps.features_backward(d_q, d_k, tokens, h, own)
    return dx, *maps.gradients()


class _Maps:
    """The projection of a layer as maps from tokens to features and from sums to values."""

    def __init__(self, weight: Tensor, bias: Tensor | None, omega: Tensor, kernel: str) -> None:
        m, D = omega.shape
        self.omega = omega
        self.num_heads = weight.shape[0] // (3 * D)
        self.weight = weight.detach().view(3, self.num_heads, D, -1)
        self.bias = None if bias is None else bias.detach().view(3, self.num_heads, D)
        self.to_features = omega @ self.weight[:2]  # (2, H, m, C)
        self.shift = None if self.bias is None else self.bias[:2] @ omega.T  # (2, H, m)
        # Half the squared norm of a key, as eq. 7 of the Performer paper scales it.
        self.half = 0.5 * D**-0.5 if kernel == "softmax" else 0.0
        self.d_features = torch.zeros_like(self.to_features)
        self.d_shift = torch.zeros_like(self.to_features[..., 0])
        self.d_weight = torch.zeros_like(self.weight)
        self.d_bias = torch.zeros_like(self.weight[..., 0])

    def features(self, x: Tensor, h: int) -> tuple[Tensor, Tensor]:
        """Features of queries and keys before the kernel's function, or their logarithms."""
        shift_q, shift_k = (None, None) if self.shift is None else self.shift[:, h]
        y_q = F.linear(x, self.to_features[0, h], shift_q)
        y_k = F.linear(x, self.to_features[1, h], shift_k)
        if self.half:
            y_k -= self._keys(x, h).square_().sum(dim=-1, keepdim=True).mul_(self.half)
        return y_q, y_k

    def features_backward(self, d_q: Tensor, d_k: Tensor, x: Tensor, h: int, dx: Tensor) -> None:
        """Add to the gradients of tokens, in ``dx``, and of the maps."""
        tokens = x.flatten(0, 1)  # (b * N, C)
        for i, grad in enumerate((d_q, d_k)):
            dx += grad @ self.to_features[i, h]
            self.d_features[i, h] += grad.flatten(0, 1).T @ tokens
            if self.bias is not None:
                self.d_shift[i, h] += grad.sum(dim=(0, 1))
        if self.half:
            d_keys = self._keys(x, h).mul_(d_k.sum(dim=-1, keepdim=True).mul_(-2 * self.half))
            dx += d_keys @ self.weight[1, h]
            self.d_weight[1, h] += d_keys.flatten(0, 1).T @ tokens
            if self.bias is not None:
                self.d_bias[1, h] += d_keys.sum(dim=(0, 1))

    def values(self, sums: Tensor, h: int, total: Tensor | None) -> Tensor:
        """Sums of tokens (b, m, C) to sums of values (b, m, D); weights add up to ``total`` or 1."""
        context = F.linear(sums, self.weight[2, h])
        if self.bias is not None:
            context += self.bias[2, h] if total is None else total * self.bias[2, h]
        return context

    def values_backward(
        self, grad: Tensor, sums: Tensor, h: int, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sums (b, m, C) and of their totals (b, m, 1)."""
        self.d_weight[2, h] += grad.flatten(0, 1).T @ sums.flatten(0, 1)
        d_total = torch.zeros_like(grad[..., :1])
        if self.bias is not None:
            self.d_bias[2, h] += (grad if total is None else grad * total).sum(dim=(0, 1))
            d_total = (grad @ self.bias[2, h]).unsqueeze(-1)
        return grad @ self.weight[2, h], d_total

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of the joint weight and its bias."""
        self.d_weight[:2] += self.omega.T @ self.d_features
        if self.bias is None:
            return self.d_weight.flatten(0, 2), None
        self.d_bias[:2] += self.d_shift @ self.omega
        return self.d_weight.flatten(0, 2), self.d_bias.flatten()

    def _keys(self, x: Tensor, h: int) -> Tensor:
        bias = None if self.bias is None else self.bias[1, h]
        return F.linear(x, self.weight[1, h], bias)
