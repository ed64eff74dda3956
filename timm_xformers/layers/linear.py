"""Linear attention from given features: keys meet values before queries meet keys.

Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv:2006.16236), eqs. 4 to 7; Choromanski et
al., 2021 (arXiv:2009.14794), eq. 4. Per head, time grows as N * m * D for m features.

Features that are exponentials are handled through their logarithms. With log-features a of queries
and b of keys, ``out_i = sum_r softmax_r(a_ir + L_r) * [sum_j exp(b_jr - L_r) v_j]`` with
``L_r = logsumexp_j b_jr`` is the same ratio, but both factors are convex weights: it needs no
stabiliser shared by tokens, heads or images, no added epsilon, and cannot overflow or divide by
zero at any scale.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.layers.masks import key_bias, key_padding

__all__ = ["FEATURE_EPS", "exponential_mix", "mix_features", "positive_mix"]

# Added to features that can be zero: then every key has weight, and every query a normaliser of at
# least m * 1e-6. The size is that of the Performer paper's code.
FEATURE_EPS = 1e-3


def exponential_mix(log_q: Tensor, log_k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear attention with features given by their logarithms.

    Args:
        log_q: Log-features of queries (B, H, N, m); any constant per query cancels.
        log_k: Log-features of keys (B, H, S, m).
        v: Values (B, H, S, E).
        bias: Additive bias per key (..., S, 1), -inf for a key that is left out.

    Returns:
        (B, H, N, E), in the type of ``v``: each row a convex combination of the rows of ``v``.
    """
    if bias is not None:
        log_k = log_k + bias
    # With every key left out the maximum is -inf; a finite one makes all weights exp(-inf) = 0.
    top = log_k.detach().amax(dim=-2, keepdim=True).clamp_min(-1e30)  # (B, H, 1, m)
    weights = (log_k - top).exp()
    # The largest weight is 1, so the clamp touches only features without any key.
    total = weights.sum(dim=-2, keepdim=True).clamp_min(0.5)  # (B, H, 1, m)
    if v.dtype == log_k.dtype:
        context = (weights.transpose(-2, -1) @ v) / total.transpose(-2, -1)  # (B, H, m, E)
    else:  # half precision: weights that sum to one keep the product in range
        context = (weights / total).to(v.dtype).transpose(-2, -1) @ v
    mixture = torch.softmax(log_q + (top + total.log()), dim=-1)  # (B, H, N, m)
    return mixture.to(v.dtype) @ context


def positive_mix(phi_q: Tensor, phi_k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Linear attention with positive features (eq. 4).

    Args:
        phi_q: Features of queries (B, H, N, m).
        phi_k: Features of keys (B, H, S, m).
        v: Values (B, H, S, E).
        keep: Weight per key (..., S, 1), 0 for a key that is left out.

    Returns:
        (B, H, N, E).
    """
    if keep is not None:
        phi_k = phi_k * keep
    # Keys meet values first: (m, E) is small, while (N, S) is the matrix we exist to avoid. The sum
    # of the keys' features is one more column, so that one product gives sums and normaliser.
    state = torch.cat([phi_k.transpose(-2, -1) @ v, phi_k.sum(dim=-2).unsqueeze(-1)], dim=-1)
    x = phi_q @ state  # (B, H, N, E + 1)
    # The floor lies below any normaliser with a key (m >= 1), and far above where 1 / x overflows.
    return x[..., :-1] / x[..., -1:].clamp_min(1e-7)


def _causal_mix(log_q: Tensor, log_k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`exponential_mix` where token i sees tokens 0..i, at every scale of the features.

    A maximum over keys that a query does not see yet would swamp those that it does. So the keys
    before a query are taken in runs of 1, 2, 4, ... tokens, each seen as a whole and scaled by its
    own maximum, and the sums over runs are put together relative to their largest: N * log N.
    """
    if bias is not None:
        log_k = log_k + bias.clamp_min(-1e30)
    N, E = v.shape[2], v.shape[3]
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).to(log_k.dtype)  # sums and normaliser
    logits = log_q + log_k  # a token and itself
    top = logits.detach().amax(dim=-1, keepdim=True)  # (B, H, N, 1)
    sums = (logits - top).exp().sum(dim=-1, keepdim=True) * v  # (B, H, N, E + 1)
    size = 1
    while size < N:
        # Pairs of runs: queries of the second see all keys of the first.
        fill = [0, 0, 0, -N % (2 * size)]
        pairs = [torch.unflatten(F.pad(x, fill), 2, [-1, 2, size]) for x in (log_q, log_k, v)]
        a, b, values = pairs[0][:, :, :, 1], pairs[1][:, :, :, 0], pairs[2][:, :, :, 0]
        peak = b.detach().amax(dim=-2, keepdim=True)  # (B, H, n, 1, m)
        logits = a + peak
        new_top = logits.detach().amax(dim=-1, keepdim=True)  # (B, H, n, size, 1)
        state = (b - peak).exp().transpose(-2, -1) @ values  # (B, H, n, m, E + 1)
        new_sums = (logits - new_top).exp() @ state
        # Queries of first runs gain nothing from this size.
        new_sums = torch.stack([torch.zeros_like(new_sums), new_sums], dim=3)
        new_top = torch.stack([torch.full_like(new_top, -3e38), new_top], dim=3)
        new_sums, new_top = new_sums.flatten(2, 4)[:, :, :N], new_top.flatten(2, 4)[:, :, :N]
        higher = torch.maximum(top, new_top)
        sums = sums * (top - higher).exp() + new_sums * (new_top - higher).exp()
        top = higher
        size *= 2
    out = sums[..., :E] / sums[..., E:]
    return out * (top > -1e29)  # zero for a query without keys


def _causal_positive_mix(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """`positive_mix` where token i sees tokens 0..i: chunks in order, one running state."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # sums and normaliser
    state = torch.zeros_like(phi_k[:, :, :1].transpose(-2, -1) @ v[:, :, :1])  # (B, H, m, E + 1)
    chunks: list[Tensor] = []
    for start in range(0, v.shape[2], chunk):
        a, b = phi_q[:, :, start : start + chunk], phi_k[:, :, start : start + chunk]
        values = v[:, :, start : start + chunk]
        chunks.append((a @ b.transpose(-2, -1)).tril() @ values + a @ state)
        state = state + b.transpose(-2, -1) @ values
    x = torch.cat(chunks, dim=2)
    return x[..., :-1] / x[..., -1:].clamp_min(1e-7)


def mix_features(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    logarithmic: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    mechanism: str = "performer",
) -> Tensor:
    """Send features to the form that fits their kind and the mask.

    Args:
        fq: Features of queries (B, H, N, m), or their logarithms.
        fk: Features of keys (B, H, S, m), likewise.
        v: Values (B, H, S, E).
        logarithmic: The features are logarithms.
        attn_mask: None, or (B, 1, 1, S): bool (True = attend) or an additive bias per key.
        is_causal: Let a token see itself and earlier ones only (N = S).
        mechanism: Name for the message.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: ``attn_mask`` differs between queries.
    """
    keep = key_padding(attn_mask, mechanism)
    bias: Tensor | None = None
    if keep is not None and attn_mask is not None:
        bias = key_bias(attn_mask, keep, fk.dtype)
    if is_causal and not logarithmic and bias is None:
        return _causal_positive_mix(fq, fk, v)
    if is_causal:
        if not logarithmic:  # a bias may outweigh all keys that came before
            fq, fk = fq.log(), fk.log()
        return _causal_mix(fq, fk, v, bias)
    if logarithmic:
        return exponential_mix(fq, fk, v, bias)
    if bias is not None:
        # A constant added to all keys cancels, so the largest weight can be 1.
        bias = bias - bias.amax(dim=-2, keepdim=True).clamp_min(-1e30)
        bias = bias.exp()
    return positive_mix(fq, fk, v, bias)
