"""Large batches on a CPU, some images at a time.

glibc maps every block above 32 MiB anew and hands it back when it is freed, so that a large tensor
is cleared page by page before it is written: at 1,025 tokens and batch 64 that takes up to a third
of a layer's time. Slices of the batch stay below. Images do not depend on each other, so the sums
are the same; weights add up their gradients slice by slice.
"""

import os
import sys
from collections.abc import Sequence

import torch
from timm.layers import use_fused_attn
from torch import Tensor

__all__ = ["cut_batch", "keep_batches_whole", "on_cpu"]

# Bytes from which a tensor is mapped anew, the most that glibc's own adaptation goes up to, and
# bytes of a slice's queries, keys and values.
_LARGE = 32 << 20
_SLICE = 24 << 20
# Thresholds that somebody raised make slices pointless.
_large = sys.maxsize if "MALLOC_MMAP_THRESHOLD_" in os.environ else _LARGE


def keep_batches_whole() -> None:
    """Cut no batches from now on; for processes that keep the memory they freed."""
    global _large
    _large = sys.maxsize


def on_cpu(x: Tensor) -> bool:
    """Whether tokens are numbers at hand on a CPU: nothing is traced, compiled or exported.

    ``timm.layers.set_fused_attn(False)`` says no, as it does to timm's own fused attention.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return not tracing and use_fused_attn()


def cut_batch(x: Tensor, width: int) -> Sequence[Tensor]:
    """Slices of a batch.

    Args:
        x: Tokens (B, N, C).
        width: Numbers that each token becomes: of queries, keys and values together.

    Returns:
        One or more tensors (b, N, C), of as many images as fit `_SLICE`, or nearly.
    """
    if not on_cpu(x):
        return [x]
    image = x.shape[1] * width * x.element_size()
    if x.shape[0] * image <= _large or x.shape[0] == 1:
        return [x]
    count = -(-x.shape[0] // max(1, _SLICE // image))
    return torch.tensor_split(x, count)
