"""Performer attention: random features instead of the (N, N) map.

Choromanski et al., "Rethinking attention with Performers", 2021 (arXiv:2009.14794): FAVOR+ with
positive orthogonal features (eqs. 5 to 7, section 3) and generalised kernels (section 3.1).
Katharopoulos et al., 2020 (arXiv:2006.16236): elu + 1. Per head, time grows as N * m * D.

Symbols: m is `num_features`; Omega is the (m, D) matrix of directions; x' = x / D^(1/4), so that
q' . k' = q . k / sqrt(D).

Departures from the paper's code, each pinned by a test:

- Kernels of exponentials (``softmax``, ``exp``) are normalised through their logarithms, see
  `linear`: no stabiliser shared by tokens or images, no added epsilon.
- The query's own norm cancels in that ratio and is not computed.
- Features are drawn at construction from a seed of the layer and change only by `redraw`.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from timm_xformers.layers.heads import HeadsAttention, autocasts, working_dtype
from timm_xformers.layers.linear import FEATURE_EPS, mix_features
from timm_xformers.layers.performer import cpu_blocks, triton

__all__ = [
    "KERNELS",
    "PerformerAttention",
    "orthogonal_directions",
    "performer_attention",
    "performer_form",
    "redraw_features",
]

KERNELS = ("softmax", "relu", "exp", "gelu", "elu")


def orthogonal_directions(num_features: int, head_dim: int, seed: int) -> Tensor:
    """Draw Omega: rows orthogonal within blocks of D, each with the norm of a Gaussian D-vector.

    Every row alone is N(0, I), so estimates stay unbiased; orthogonality lowers their variance
    (section 3.2 of the paper).

    Args:
        num_features: Number of rows m.
        head_dim: Row length D.
        seed: Seed of a generator of this draw's own.

    Returns:
        (m, D), float32, on the CPU.
    """
    rng = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, num_features, head_dim):
        gaussian = torch.randn(head_dim, head_dim, generator=rng, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        # LAPACK leaves the signs open; fixing them makes the draw uniform and reproducible.
        q = q * r.diagonal().sign()
        blocks.append(q.T[: num_features - start])
    directions = torch.cat(blocks)  # (m, D), unit rows
    norms = torch.randn(num_features, head_dim, generator=rng, dtype=torch.float64, device="cpu")
    lengths = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    omega: Tensor = directions * lengths
    return omega.float()


def _positive_features(x: Tensor, omega: Tensor, kernel: str, eps: float = FEATURE_EPS) -> Tensor:
    """Features of a kernel without exponentials, from y = x Omega^T with Omega scaled already."""
    if kernel == "relu":
        # The constant rides on the matrix product: relu(y) + eps = max(y + eps, eps).
        shift = omega.new_full((omega.shape[0],), eps)
        return F.linear(x, omega, shift).clamp_min(eps)
    y = F.linear(x, omega)
    if kernel == "gelu":  # its minimum is -0.169971
        return F.gelu(y) + (0.17 + eps)
    # elu + 1 rounds to exactly 0 below about -17 in float32.
    return F.elu(y) + (1.0 + eps)


def _performer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    kernel: str,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The definition in plain PyTorch; omega scaled, in the type of the features."""
    dtype = omega.dtype
    q, k = q.to(dtype), k.to(dtype)
    if kernel != "softmax" and kernel != "exp":
        fq = _positive_features(q, omega, kernel)
        fk = _positive_features(k, omega, kernel)
        return mix_features(fq, fk, v.to(dtype), False, attn_mask, is_causal)
    fq, fk = F.linear(q, omega), F.linear(k, omega)  # (B, H, N, m)
    if kernel == "softmax":
        # eq. 7: w . k' - |k'|^2 / 2.
        fk = fk - k.square().sum(dim=-1, keepdim=True) * (0.5 * k.shape[-1] ** -0.5)
    return mix_features(fq, fk, v, True, attn_mask, is_causal)


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Mix tokens with weights phi(q) . phi(k), normalised per query.

    ``softmax`` estimates exact attention, with an error that falls as 1 / sqrt(m); the other
    kernels are attention of their own kind. phi(x) is, with y = x' Omega^T: ``softmax``
    exp(y - |x'|^2 / 2); ``exp`` exp(y); ``relu`` relu(y) + 1e-3; ``gelu`` gelu(y) + 0.171; ``elu``
    elu(y) + 1.001.

    Args:
        q: Queries (B, H, N, D), unscaled.
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        projection: Directions Omega (m, D), see `orthogonal_directions`.
        kernel: One of `KERNELS`.
        attn_mask: None, or (B, 1, 1, S): bool (True = attend) or an additive bias per key. A
            query without any key gives zeros.
        is_causal: Let a token see itself and earlier ones only (N = S).

    Returns:
        (B, H, N, E) in the type of ``v``. Exponents and, from float16, all sums are float32.

    Raises:
        ValueError: ``attn_mask`` differs between queries.
    """
    wide = kernel == "softmax" or kernel == "exp" or is_causal
    omega = (projection * q.shape[-1] ** -0.25).to(working_dtype(q.dtype, wide=wide))
    if torch.jit.is_scripting():
        x = _performer(q, k, v, omega, kernel, attn_mask, is_causal)
    else:
        form = performer_form(q, k, v, projection, kernel, attn_mask, is_causal)
        if form == "triton":
            x = triton.fused_performer_attention(q, k, v, projection, kernel, attn_mask)
        elif form == "cpu_blocks":
            run = cpu_blocks.image_by_image if wide else cpu_blocks.blocked_performer
            x = run(q, k, v, omega, kernel, _performer)
        elif autocasts(q.device.type):  # it would round exponents to three digits
            with torch.autocast(q.device.type, enabled=False):
                x = _performer(q, k, v, omega, kernel, attn_mask, is_causal)
        else:
            x = _performer(q, k, v, omega, kernel, attn_mask, is_causal)
    return x.to(v.dtype)


def performer_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> str:
    """Which code `performer_attention` runs for these arguments, its own; all compute the same.

    Returns:
        ``"triton"`` (`triton`: NVIDIA GPUs, if asked for), ``"cpu_blocks"`` (`cpu_blocks`: CPUs, in
        eager mode, no mask, enough tokens), or ``"plain"``.
        ``timm.layers.set_fused_attn(False)`` makes it ``"plain"`` everywhere.
    """
    if triton.fits(q, k, v, projection, attn_mask, is_causal):
        return "triton"
    exponential = kernel == "softmax" or kernel == "exp"
    unmasked = attn_mask is None and not is_causal
    if unmasked and cpu_blocks.pays(q, projection.shape[0], exponential):
        return "cpu_blocks"
    return "plain"


# Sizes and masks decide what is computed, which torch.fx cannot follow: it calls this as it is.
torch.fx.wrap("performer_attention")


class PerformerAttention(HeadsAttention):
    """Multi-head Performer attention on tokens (B, N, C).

    Args:
        kernel: One of `KERNELS`.
        num_features: m.
        feature_seed: Seed of the directions. Layers built with one seed share them; `redraw` or
            `redraw_features` gives each its own.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: Unknown kernel, ``num_features`` below 1, or what `HeadsAttention` refuses.
    """

    mechanism = "performer"
    has_map = False
    masks = "keys"
    features: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kernel: str = "softmax",
        num_features: int = 64,
        feature_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r} is unknown; choose from {', '.join(KERNELS)}.")
        if num_features < 1:
            raise ValueError(f"num_features={num_features} must be at least 1, e.g. 64.")
        super().__init__(dim, num_heads, **kwargs)
        self.kernel = kernel
        self.num_features = num_features
        self.feature_seed = feature_seed
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        # A buffer, since features are not trained, and a saved one, since weights were trained with
        # these and no others.
        self.register_buffer("features", torch.empty(num_features, self.head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions of ``feature_seed`` again."""
        self.redraw(self.feature_seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Replace the directions by those of another seed, in place."""
        self.feature_seed = seed
        self.features.copy_(orthogonal_directions(self.num_features, self.head_dim, seed))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Performer attention per head, (B, H, N, D)."""
        return performer_attention(
            q, k, v, self.features, kernel=self.kernel, attn_mask=attn_mask, is_causal=is_causal
        )

    @torch.jit.unused
    def form(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str:
        """Which code a call with these tokens (B, N, C) runs, see `performer_form`."""
        q, k, v = self.project(x)
        return performer_form(q, k, v, self.features, self.kernel, attn_mask, is_causal)

    def extra_repr(self) -> str:
        """Kernel and feature count, for printing."""
        return f"kernel={self.kernel}, num_features={self.num_features}"


def redraw_features(model: nn.Module, seed: int = 0) -> int:
    """Give every Performer layer of a model directions of its own.

    Args:
        model: Any module.
        seed: Layers get ``seed * 1000 + index`` in the order of ``model.modules()``.

    Returns:
        The number of layers redrawn.
    """
    layers = [m for m in model.modules() if isinstance(m, PerformerAttention)]
    for index, layer in enumerate(layers):
        layer.redraw(seed * 1000 + index)
    return len(layers)
