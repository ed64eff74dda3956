"""Nyström attention: the map rebuilt from landmarks.

Xiong et al., "Nyströmformer", 2021 (arXiv:2102.03902), eqs. 10 to 14. Per head, time grows as
N * l * D + l^3 for l landmarks. With F = softmax(Q K~^T), A = softmax(Q~ K~^T),
B = softmax(Q~ K^T), all scaled by 1 / sqrt(D), the output is F A^+ (B V), right to left.

Departures from the authors' code, each pinned by a test:

- The inverse is started from a scale of each matrix, not from one maximum over the batch, so an
  image's result does not depend on its neighbours.
- When l does not divide N, segments differ by one token; nothing is padded, so no zeros take part
  in the softmax.
- With no more tokens than landmarks the result is exact attention, computed directly.
- A bias per key, which the paper does not have, is one more element of each key: a landmark is the
  mean of its keys and of their biases, weighted by softmax of the biases within the segment.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from timm_xformers.layers.depthwise import convolve_tokens
from timm_xformers.layers.heads import (
    HeadsAttention,
    attend,
    autocasts,
    is_open,
    working_dtype,
)
from timm_xformers.layers.masks import clear_left_out, refuse_causal, relative_bias

__all__ = [
    "HeadConv",
    "NystromAttention",
    "iterative_pinv",
    "nystrom_attention",
    "segment_means",
]


def segment_means(x: Tensor, num_segments: int) -> Tensor:
    """Means of consecutive tokens.

    Args:
        x: (..., N, D) with N >= num_segments.
        num_segments: l. The first N mod l segments hold one token more than the rest.

    Returns:
        (..., l, D).
    """
    N = x.shape[-2]
    size, longer = N // num_segments, N % num_segments
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript compiles what follows "and")
        if is_open(N):
            # Free in an exported graph, which has no branches: l means as a matrix over the tokens.
            number = torch.arange(num_segments + 1, device=x.device).unsqueeze(1)
            starts = number * size + number.clamp_max(longer)  # (l + 1, 1)
            places = torch.arange(N, device=x.device)
            within = (places >= starts[:-1]) & (places < starts[1:])  # (l, N)
            return (within / starts.diff(dim=0)).to(x.dtype) @ x
    if longer == 0:
        return torch.unflatten(x, -2, [num_segments, size]).mean(dim=-2)
    cut = longer * (size + 1)
    head = torch.unflatten(x[..., :cut, :], -2, [longer, size + 1]).mean(dim=-2)
    tail = torch.unflatten(x[..., cut:, :], -2, [num_segments - longer, size]).mean(dim=-2)
    return torch.cat([head, tail], dim=-2)


def iterative_pinv(a: Tensor, num_steps: int) -> Tensor:
    """Moore-Penrose inverse by the paper's cubic iteration (eq. 14).

    Args:
        a: (..., l, l) with rows that sum to one.
        num_steps: Six reach about three digits on well-conditioned maps.

    Returns:
        (..., l, l).
    """
    given = a
    a = a.reshape(-1, a.shape[-2], a.shape[-1])
    # |A|_1 * |A|_inf per matrix; the second is 1, because A's rows are probabilities.
    z = a.transpose(-2, -1) / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    # z (13 I - az (15 I - az (7 I - az))) / 4 with each bracket multiplied out, so that one kernel
    # multiplies and adds: the identities took as long as the products.
    for _ in range(num_steps):
        az = torch.bmm(a, z)
        inner = torch.baddbmm(az, az, az, beta=7.0, alpha=-1.0)
        outer = torch.baddbmm(az, az, inner, beta=15.0, alpha=-1.0)
        z = torch.baddbmm(z, z, outer, beta=3.25, alpha=-0.25)
    return z.reshape_as(given)  # TorchScript's exporter would write the shape into the file


def _nystrom(
    q: Tensor, k: Tensor, v: Tensor, num_landmarks: int, pinv_steps: int, bias: Tensor | None
) -> Tensor:
    if k.shape[-2] <= num_landmarks:
        return attend(q, k, v, None if bias is None else bias.transpose(-2, -1))
    dtype = working_dtype(q.dtype, wide=False)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    if bias is None:
        q_marks, k_marks = segment_means(q, num_landmarks), segment_means(k, num_landmarks)
        scores = (q_marks.to(exact) @ k_marks.to(exact).transpose(-2, -1)) * scale
        inverse = iterative_pinv(scores.softmax(dim=-1), pinv_steps)  # (B, H, l, l)
        context = inverse @ attend(q_marks, k, v).to(exact)  # (B, H, l, D)
        return attend(q, k_marks, context.to(dtype))
    # Left-out tokens take no part in a landmark; a landmark of none takes no part at all: it is
    # hidden from queries, and a row of the identity keeps the inverse block-diagonal.
    weight = bias.exp().to(dtype)
    share = segment_means(weight, num_landmarks)  # (..., l, 1)
    filled = share > 0
    share = share.clamp_min(1e-37)
    q_marks = segment_means(q * weight, num_landmarks) / share
    k_marks = segment_means(k * weight, num_landmarks) / share
    finite = bias.masked_fill(bias == float("-inf"), 0.0)
    mark_bias = segment_means(weight * finite.to(dtype), num_landmarks) / share
    columns = mark_bias.masked_fill(~filled, float("-inf")).transpose(-2, -1)  # (..., 1, l)
    # One column stays open where all are empty, to keep the softmax of such an image finite.
    opened = columns.masked_fill(~filled.any(dim=-2, keepdim=True), 0.0)
    scores = (q_marks.to(exact) @ k_marks.to(exact).transpose(-2, -1)) * scale + opened.to(exact)
    eye = torch.eye(num_landmarks, dtype=exact, device=q.device)
    marks = torch.where(filled, scores.softmax(dim=-1), eye)
    inverse = iterative_pinv(marks, pinv_steps)
    context = inverse @ attend(q_marks, k, v, bias.transpose(-2, -1)).to(exact)
    return attend(q, k_marks, context.to(dtype), columns)


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int = 64,
    pinv_steps: int = 6,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Mix tokens with the Nyström form of softmax attention.

    Args:
        q: Queries (B, H, N, D), unscaled.
        k: Keys (B, H, N, D).
        v: Values (B, H, N, E).
        num_landmarks: l, means of consecutive tokens. l >= N gives exact attention.
        pinv_steps: Steps of `iterative_pinv`.
        attn_mask: None, or (B, 1, 1, N): bool (True = attend) or an additive bias per key; 80 below
            the highest is left out. A query without any key gives zeros.

    Returns:
        (B, H, N, E) in the type of ``v``. The inverse is float32 at least.

    Raises:
        ValueError: ``attn_mask`` differs between queries.
    """
    bias = relative_bias(attn_mask, "nystrom", torch.promote_types(q.dtype, torch.float32))
    if torch.jit.is_scripting():
        x = _nystrom(q, k, v, num_landmarks, pinv_steps, bias)
    elif autocasts(q.device.type):  # it would run the inverse in half precision
        with torch.autocast(q.device.type, enabled=False):
            x = _nystrom(q, k, v, num_landmarks, pinv_steps, bias)
    else:
        x = _nystrom(q, k, v, num_landmarks, pinv_steps, bias)
    return x.to(v.dtype)


class HeadConv(nn.Module):
    """Depthwise convolution along the tokens, one filter per head: (B, H, N, D) to the same.

    Raises:
        ValueError: ``kernel_size`` is even.
    """

    def __init__(
        self,
        num_heads: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, e.g. {kernel_size + 1}.")
        self.weight = nn.Parameter(
            torch.empty(num_heads, 1, kernel_size, 1, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters as `torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, v: Tensor) -> Tensor:
        """Convolve values (B, H, N, D) along N."""
        H, D = v.shape[1], v.shape[3]
        weight = self.weight.repeat_interleave(D, dim=0)  # one filter for each (head, element)
        x = convolve_tokens(v.transpose(1, 2).flatten(2), weight, 1)
        return torch.unflatten(x, 2, [H, D]).transpose(1, 2)


# Shapes decide what is computed, which torch.fx cannot follow: it calls these as they are.
torch.fx.wrap("clear_left_out")
torch.fx.wrap("nystrom_attention")
torch.fx.wrap("refuse_causal")


class NystromAttention(HeadsAttention):
    """Multi-head Nyström attention on tokens (B, N, C).

    Args:
        num_landmarks: l.
        pinv_steps: Steps of the inverse.
        conv_kernel: Length of the residual convolution of the values, 0 for none. The paper's
            models use 33; without it the layer approximates exact attention.
        **kwargs: Like ``dim`` and ``num_heads``, arguments of `HeadsAttention`.

    Raises:
        ValueError: ``num_landmarks`` or ``pinv_steps`` below 1, an even ``conv_kernel``, or what
            `HeadsAttention` refuses.
    """

    mechanism = "nystrom"
    has_map = False
    causal = False
    masks = "keys"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_landmarks: int = 64,
        pinv_steps: int = 6,
        conv_kernel: int = 0,
        **kwargs: Any,
    ) -> None:
        if num_landmarks < 1 or pinv_steps < 1:
            raise ValueError(
                f"num_landmarks={num_landmarks} and pinv_steps={pinv_steps} must be at least 1, "
                "e.g. 64 and 6."
            )
        super().__init__(dim, num_heads, **kwargs)
        self.num_landmarks = num_landmarks
        self.pinv_steps = pinv_steps
        self.conv: nn.Module | None = None
        if conv_kernel:
            self.conv = HeadConv(
                self.num_heads,
                conv_kernel,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
            )

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Nyström attention per head plus the residual convolution, (B, H, N, D)."""
        refuse_causal(is_causal, "nystrom")
        x = nystrom_attention(
            q,
            k,
            v,
            num_landmarks=self.num_landmarks,
            pinv_steps=self.pinv_steps,
            attn_mask=attn_mask,
        )
        if self.conv is not None:
            x = x + self.conv(clear_left_out(v, attn_mask, "nystrom"))
        return x

    def extra_repr(self) -> str:
        """Landmarks, for printing."""
        return f"num_landmarks={self.num_landmarks}, pinv_steps={self.pinv_steps}"
