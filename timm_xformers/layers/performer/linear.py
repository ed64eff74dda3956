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


def _causal_mix(
    log_q: Tensor, log_k: Tensor, v: Tensor, bias: Tensor | None, chunk: int = 128
) -> Tensor:
    """`exponential_mix` where token i sees tokens 0..i: chunks in order, one running state.

    Exact within what float32 holds of exp(b_i - max_j b_j) inside a chunk.
    """
    if bias is not None:
        log_k = log_k + bias
    B, H, N, m = log_k.shape
    v = v.to(log_k.dtype)
    state = torch.zeros(B, H, m, v.shape[-1], dtype=v.dtype, device=v.device)
    seen = torch.zeros(B, H, 1, m, dtype=v.dtype, device=v.device)
    top = torch.full((B, H, 1, m), -1e30, dtype=v.dtype, device=v.device)
    chunks: list[Tensor] = []
    for start in range(0, N, chunk):
        a = log_q[:, :, start : start + chunk]
        b = log_k[:, :, start : start + chunk]
        values = v[:, :, start : start + chunk]
        new_top = torch.maximum(top, b.detach().amax(dim=-2, keepdim=True))
        decay = (top - new_top).exp()
        state = state * decay.transpose(-2, -1)
        seen = seen * decay
        top = new_top
        logits = a + top
        phi_q = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
        phi_k = (b - top).exp()
        inside = (phi_q @ phi_k.transpose(-2, -1)).tril()
        norm = inside.sum(dim=-1, keepdim=True) + (phi_q * seen).sum(dim=-1, keepdim=True)
        chunks.append((inside @ values + phi_q @ state) / norm.clamp_min(1e-30))
        state = state + phi_k.transpose(-2, -1) @ values
        seen = seen + phi_k.sum(dim=-2, keepdim=True)
    return torch.cat(chunks, dim=2)


def mix_features(
    fq: Tensor, fk: Tensor, v: Tensor, logarithmic: bool, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Send features to the form that fits their kind and the mask.

    Args:
        fq: Features of queries (B, H, N, m), or their logarithms.
        fk: Features of keys (B, H, S, m), likewise.
        v: Values (B, H, S, E).
        logarithmic: The features are logarithms.
        attn_mask: None, or (B, 1, 1, S): bool (True = attend) or an additive bias per key.
        is_causal: Let a token see itself and earlier ones only (N = S).

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: ``attn_mask`` differs between queries.
    """
    keep = key_padding(attn_mask, "performer")
    bias: Tensor | None = None
    if keep is not None and attn_mask is not None:
        bias = key_bias(attn_mask, keep, fk.dtype)
    if is_causal:
        if not logarithmic:
            fq, fk = fq.log(), fk.log()
        return _causal_mix(fq, fk, v, bias)
    if logarithmic:
        return exponential_mix(fq, fk, v, bias)
    if bias is not None:
        # A constant added to all keys cancels, so the largest weight can be 1.
        bias = bias - bias.amax(dim=-2, keepdim=True).clamp_min(-1e30)
        bias = bias.exp()
    return positive_mix(fq, fk, v, bias)
