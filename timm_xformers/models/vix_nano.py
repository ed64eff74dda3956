"""A vision transformer of some 1,500 parameters for 28x28 digits, to study what matters.

Patches of 4x4 pixels, tokens of width 8, fixed sinusoidal positions, pre-norm blocks, no norm at
the end. A head is not a projection of the whole token: it takes its slice of four channels and maps
that slice to queries, keys and values, and nothing mixes the heads before the MLP.

``double_softmax=True`` gives probabilities instead of logits. Under cross entropy that is softmax
twice: the loss cannot fall below 1.4612 for ten classes, a confident mistake costs one more and no
further, and gradients vanish.
"""

from typing import Any

import torch
from torch import Tensor, nn

from timm_xformers.models._cfg import default_configs, small_image_cfg
from timm_xformers.models._register import register_model
from timm_xformers.models._trunk import Trunk, build

__all__ = ["ViXNano"]


class SliceProjection(nn.Module):
    """Queries, keys and values from each head's own slice: (B, N, H * D) to (B, N, 3 * H * D).

    Args:
        num_heads: Number of heads H.
        head_dim: Width D of a slice.
        device: Where to create the parameters.
        dtype: Their type.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = 3, num_heads, head_dim
        self.weight = nn.Parameter(torch.empty(*shape, head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each map as `torch.nn.Linear` does."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens (B, N, H * D) to (B, N, 3 * H * D)."""
        B, N, _ = x.shape
        _, H, D, _ = self.weight.shape
        x = torch.einsum("bnhd,shed->bnshe", x.reshape(B, N, H, D), self.weight)
        return (x + self.bias).reshape(B, N, 3 * H * D)


class ViXNano(Trunk):
    """The study model: images (B, 1, 28, 28) to logits.

    Args:
        double_softmax: Give probabilities, for a loss that will take their softmax again.
        **kwargs: Arguments of `Trunk` and of timm's `VisionTransformer`.

    Raises:
        ValueError: What `Trunk` refuses.
        TypeError: An argument that nobody has.
    """

    def __init__(self, *, double_softmax: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.double_softmax = double_softmax
        for block in self.blocks:
            attn: Any = block.attn
            weight = attn.qkv.weight
            attn.qkv = SliceProjection(
                attn.num_heads, attn.head_dim, device=weight.device, dtype=weight.dtype
            )
            attn.proj = nn.Identity()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm does; the class token as the source does."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            nn.init.uniform_(self.cls_token)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), or probabilities."""
        x = self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
        return x.softmax(dim=-1) if self.double_softmax else x


default_cfgs = default_configs(
    {
        "vix_mnist_nano": small_image_cfg(
            input_size=(1, 28, 28), mean=(0.0,), std=(1.0,), first_conv="patch_embed.proj"
        )
    }
)


@register_model
def vix_mnist_nano(pretrained: bool = False, **kwargs: Any) -> ViXNano:
    """Three blocks of width 8, two heads of 4, MLP 16: 1,530 parameters."""
    defaults = {
        "attn_layer": "softmax",
        "pos_embed": "sine",
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "final_norm": False,
        "weight_init": "reset",  # as the layers start by themselves
    }
    return build(ViXNano, "vix_mnist_nano", pretrained, defaults, **kwargs)
