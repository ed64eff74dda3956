"""Optional GPU kernels: the same functions as in plain PyTorch, chosen where they pay.

Plain PyTorch is the definition and the fallback. Nothing here imports Triton before it is used.
"""

from timm_xformers.layers.performer.triton.choice import fits
from timm_xformers.layers.performer.triton.operators import fused_performer_attention

__all__ = ["fits", "fused_performer_attention"]
