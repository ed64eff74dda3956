"""Performer attention on a CPU whose features are taken from tokens, not from queries and keys.

A feature is a dot product with a query or key, which is a linear map of a token: so it is a dot
product with the token, by a vector of C numbers that is known beforehand. Values are linear in
tokens too, and the sum over keys can be formed of tokens and projected then. Queries, keys and
values are never there, and where heads are wide or features few that is less work (`pays_folded`):
per token and head 3 m C + m D products instead of 3 C D + 4 m D.

Images are taken one at a time, so that an image's features stay in the cache, and the gradient is
found by hand, as in `blocked`. The softmax kernel needs a key's norm, hence the keys, for that
alone. Log-features are treated as in `linear.exponential_mix`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.blocked import Plain, positive_features, positive_slope

__all__ = ["folded_performer", "pays_folded"]

# The two orders are compared by products; the folded one has more small ones beside them.
LEAST_GAIN = 1.3

LOGARITHMIC = ("softmax", "exp")


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
    x: Tensor, weight: Tensor, bias: Tensor | None, omega: Tensor, kernel: str, plain: Plain
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
    given = (x, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    found: tuple[Tensor, ...] = _Folded.apply(*given, omega, kernel, plain, keep)
    return found[0]


class _Folded(torch.autograd.Function):
    """Values, and gradients of tokens, weight and bias."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        omega: Tensor,
        kernel: str,
        plain: Plain,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        maps = _Maps(weight, bias, omega, kernel)
        B, N, C = x.shape
        H, m = maps.num_heads, omega.shape[0]
        out = x.new_empty(B, N, H, omega.shape[1])
        logarithmic = kernel in LOGARITHMIC
        state = x.new_empty(B, H, m, C) if keep else None
        known = None
        if keep:  # weights of either side, or the normalisers of the queries
            known = x.new_empty((B, N, 2, H, m) if logarithmic else (B, H, N, 1))
        for i in range(B):
            y = maps.features(x[i])  # (N, 2, H, m)
            if logarithmic:
                log_k = y[:, 1]
                top = log_k.amax(dim=0)  # (H, m)
                weights = log_k.sub_(top).exp_()
                total = weights.sum(dim=0)
                y[:, 0] = y[:, 0].add_(total.log().add_(top)).softmax(dim=-1)
                weights.div_(total)
                sums = torch.unflatten(weights.flatten(1).T @ x[i], 0, (H, m))
                torch.bmm(_heads(y[:, 0]), maps.values(sums, None), out=_heads(out[i]))
                pieces = sums, y
            else:
                phi, _ = positive_features(y, kernel)
                sums = torch.unflatten(phi[:, 1].flatten(1).T @ x[i], 0, (H, m))  # (H, m, C)
                total = phi[:, 1].sum(dim=0).unsqueeze(-1)  # (H, m, 1)
                norm = torch.bmm(_heads(phi[:, 0]), total)  # (H, N, 1)
                mixed = torch.bmm(_heads(phi[:, 0]), maps.values(sums, total))
                torch.div(mixed, norm, out=_heads(out[i]))
                pieces = sums, norm
            if state is not None and known is not None:
                state[i], known[i] = pieces
        return out.flatten(2), state, known

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x, weight, bias, omega, ctx.kernel, ctx.plain, keep = inputs
        if keep:
            ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, omega, *output)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            return *_gradient_plain(ctx, grad), None, None, None, None
        with torch.autocast("cpu", enabled=False):
            return *_gradient(ctx, grad), None, None, None, None


def _gradient_plain(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors[:3]
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(ctx.plain(*given), wanted, grad, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in given)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, omega, out, state, known = ctx.saved_tensors
    maps = _Maps(weight, bias, omega, ctx.kernel)
    H, m = maps.num_heads, omega.shape[0]
    out, grad = (torch.unflatten(t, -1, (H, -1)) for t in (out, grad))
    dx = torch.empty_like(x)
    for i in range(x.shape[0]):
        sums, g = state[i], _heads(grad[i])  # (H, m, C), (H, N, D)
        if ctx.kernel in LOGARITHMIC:
            phi = known[i]
            d_values = torch.bmm(_heads(phi[:, 0]).transpose(1, 2), g)  # (H, m, D)
            d_sums, _ = maps.values_backward(d_values, sums, None)
            rows = d_sums.flatten(0, 1)  # (H * m, C)
            d_mixture = torch.bmm(g, maps.values(sums, None).transpose(1, 2))
            d_weights = torch.unflatten(x[i] @ rows.T, 1, (H, m))
            dy = torch.empty_like(phi)
            dy[:, 0] = torch._softmax_backward_data(
                _heads(d_mixture), phi[:, 0].contiguous(), -1, x.dtype
            )
            weights = phi[:, 1].contiguous()
            d_log_k = torch._softmax_backward_data(d_weights, weights, 0, x.dtype)
            dy[:, 1] = d_log_k.addcmul_(weights, dy[:, 0].sum(dim=0))
        else:
            phi, slope = positive_features(maps.features(x[i]), ctx.kernel)
            total = phi[:, 1].sum(dim=0).unsqueeze(-1)  # (H, m, 1)
            d_mixed = g / known[i]
            d_norm = (d_mixed * _heads(out[i])).sum(dim=-1, keepdim=True).neg_()  # (H, N, 1)
            phi_q = _heads(phi[:, 0])
            d_values = torch.bmm(phi_q.transpose(1, 2), d_mixed)
            d_sums, d_total = maps.values_backward(d_values, sums, total)
            rows = d_sums.flatten(0, 1)
            d_total = d_total + torch.bmm(phi_q.transpose(1, 2), d_norm)  # (H, m, 1)
            d_phi = torch.empty_like(phi)
            d_phi_q = torch.bmm(d_mixed, maps.values(sums, total).transpose(1, 2))
            _heads(d_phi[:, 0]).copy_(d_phi_q.addcmul_(d_norm, total.transpose(1, 2)))
            d_phi_k = torch.addmm(d_total.flatten(), x[i], rows.T)
            d_phi[:, 1] = torch.unflatten(d_phi_k, 1, (H, m))
            dy = positive_slope(d_phi, slope, ctx.kernel)
        torch.mm(phi[:, 1].flatten(1), rows, out=dx[i])
        maps.features_backward(dy, x[i], dx[i])
    return dx, *maps.gradients()


def _heads(x: Tensor) -> Tensor:
    """(N, H, ...) seen as (H, N, ...), and back."""
    return x.transpose(0, 1)


class _Maps:
    """The projection of a layer as maps from tokens to features and from sums to values."""

    def __init__(self, weight: Tensor, bias: Tensor | None, omega: Tensor, kernel: str) -> None:
        m, D = omega.shape
        H = self.num_heads = weight.shape[0] // (3 * D)
        self.omega = omega
        self.weight = weight.detach().view(3, H, D, -1)
        self.bias = None if bias is None else bias.detach().view(3, H, D)
        self.to_features = (omega @ self.weight[:2]).view(2 * H * m, -1)
        self.shift = None if self.bias is None else (self.bias[:2] @ omega.T).flatten()
        # Half the squared norm of a key, as eq. 7 of the Performer paper scales it.
        self.half = 0.5 * D**-0.5 if kernel == "softmax" else 0.0
        self.d_features = torch.zeros_like(self.to_features)
        self.d_shift = torch.zeros_like(self.to_features[:, 0])
        self.d_weight = torch.zeros_like(self.weight)
        self.d_bias = torch.zeros_like(self.weight[..., 0])

    def features(self, x: Tensor) -> Tensor:
        """Features of queries and keys (N, 2, H, m) before the kernel's function, or their logs."""
        y = F.linear(x, self.to_features, self.shift)
        y = y.view(x.shape[0], 2, self.num_heads, -1)
        if self.half:
            y[:, 1] -= self._keys(x).square_().sum(dim=-1, keepdim=True).mul_(self.half)
        return y

    def features_backward(self, grad: Tensor, x: Tensor, dx: Tensor) -> None:
        """Add to the gradients of tokens, in ``dx``, and of the maps."""
        rows = grad.flatten(1)  # (N, 2 * H * m)
        dx.addmm_(rows, self.to_features)
        self.d_features.addmm_(rows.T, x)
        if self.bias is not None:
            self.d_shift += rows.sum(dim=0)
        if self.half:
            pull = grad[:, 1].sum(dim=-1, keepdim=True).mul_(-2 * self.half)  # (N, H, 1)
            d_keys = self._keys(x).mul_(pull).flatten(1)  # (N, H * D)
            dx.addmm_(d_keys, self.weight[1].flatten(0, 1))
            self.d_weight[1].flatten(0, 1).addmm_(d_keys.T, x)
            if self.bias is not None:
                self.d_bias[1] += d_keys.sum(dim=0).view_as(self.d_bias[1])

    def values(self, sums: Tensor, total: Tensor | None) -> Tensor:
        """Sums of tokens (H, m, C) to sums of values (H, m, D); weights add to ``total`` or 1."""
        context = torch.bmm(sums, self.weight[2].transpose(1, 2))
        if self.bias is not None:
            shift = self.bias[2].unsqueeze(1)  # (H, 1, D)
            context += shift if total is None else total * shift
        return context

    def values_backward(
        self, grad: Tensor, sums: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sums (H, m, C) and of their totals (H, m, 1)."""
        self.d_weight[2] += torch.bmm(grad.transpose(1, 2), sums)
        d_total = torch.zeros_like(grad[..., :1])
        if self.bias is not None:
            self.d_bias[2] += (grad if total is None else grad * total).sum(dim=1)
            d_total = torch.bmm(grad, self.bias[2].unsqueeze(-1))
        return torch.bmm(grad, self.weight[2]), d_total

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of the joint weight and its bias."""
        self.d_weight[:2] += self.omega.T @ self.d_features.view(
            2, self.num_heads, self.omega.shape[0], -1
        )
        if self.bias is None:
            return self.d_weight.flatten(0, 2), None
        self.d_bias[:2] += self.d_shift.view(2, self.num_heads, -1) @ self.omega
        return self.d_weight.flatten(0, 2), self.d_bias.flatten()

    def _keys(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[1].flatten()
        keys = F.linear(x, self.weight[1].flatten(0, 1), bias)
        return torch.unflatten(keys, -1, (self.num_heads, -1))
