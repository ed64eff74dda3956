"""When the fused kernels run: installed, able to, and expected to be faster."""

import functools
import logging
import os

import torch
from timm.layers import use_fused_attn
from torch import Tensor

__all__ = ["MIN_TOKENS", "fits", "padded", "shared_memory"]

_logger = logging.getLogger(__name__)

# Tokens of a batch (B * N) from which they are chosen. Reasoned, not measured: below some 8k tokens
# all forms are bound by launches, of which the fused form has three and Python's share of each is
# the larger; above, by memory traffic, of which it has four passes where eager has ten and more.
MIN_TOKENS = 8192
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bfloat16 and TF32 in matrix units.
OLDEST_GPU = (8, 0)
# Largest m and D that stay in registers, and bytes of shared memory for each number of a state
# (m, D), as the compiler lays them out for an H200; in bfloat16 and in the other types.
LIMITS_BF16 = (128, 12)
LIMITS = (64, 36)
# What a program may have where PyTorch does not say (before 2.6): the least of these GPUs.
LEAST_SHARED = 101376
H200_SHARED = 232448

# Versions of PyTorch that cannot tell exporting from compiling get the plain form in both.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def fits(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether `fused_performer_attention` takes these arguments and should.

    No GPU has run them yet, so they wait for timm's switch for what is not proven
    (``TIMM_FUSED_ATTN=2``, ``timm.layers.set_fused_attn(True, experimental=True)``). There is no
    second derivative, no forward mode, no causality and no ``vmap``. Arguments are those of
    `performer_attention`.
    """
    # Graphs that leave the process must hold PyTorch's own operations. Before anything is asked of
    # shapes, which are symbols there.
    if is_causal or not use_fused_attn(experimental=True) or _exporting():
        return False
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return False
    shared = _shared(q.device.type, q.device.index)
    if shared == 0:
        return False
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype not in DTYPES:
        return False
    if projection.dtype not in DTYPES or projection.requires_grad:
        return False
    if attn_mask is not None and (
        attn_mask.requires_grad or attn_mask.dim() != 4 or attn_mask.shape[1:3] != (1, 1)
    ):
        return False
    B, _, N, D = q.shape
    E, m = v.shape[-1], projection.shape[0]
    if D not in WIDTHS or E not in WIDTHS:
        return False
    largest, size = LIMITS_BF16 if q.dtype == v.dtype == torch.bfloat16 else LIMITS
    if max(m, D, E) > largest or padded(m) * max(D, E) * size > shared:
        return False
    return B * N >= MIN_TOKENS


def padded(num_features: int) -> int:
    """Features as blocks count them: a power of two."""
    return max(16, 1 << (num_features - 1).bit_length())


def _shared(device_type: str, index: int | None) -> int:
    return shared_memory(device_type, index)


# As torch.compiler.assume_constant_result marks it, which would import the compiler to do so.
_shared._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def shared_memory(device_type: str, index: int | None) -> int:
    """Bytes of a device's shared memory for a program; 0 where Triton does not work."""
    if device_type == "cpu":  # for tests: the interpreter is slow
        if os.environ.get("TRITON_INTERPRET") != "1":
            return 0
    elif device_type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return 0  # AMD's GPUs go by the same name
    elif torch.cuda.get_device_capability(index) < OLDEST_GPU:
        return 0
    try:
        from timm_xformers.layers.performer.triton import blocks
    except ImportError:  # it comes with PyTorch's own builds for GPUs, and not with others
        return 0
    if device_type == "cpu":
        return H200_SHARED
    try:
        with torch.cuda.device(index):
            blocks.probe[(1,)](enable_fp_fusion=True)
    except Exception as error:  # no compiler, no headers of Python, another driver, ...
        reason = " ".join(str(error).split())[:200]
        _logger.warning(
            "Triton is installed but does not work (%s: %s); attention runs in plain PyTorch.",
            type(error).__name__,
            reason,
        )
        return 0
    properties: object = torch.cuda.get_device_properties(index)
    return int(getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED))
