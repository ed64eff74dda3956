"""ViX: vision transformers on pixel tokens with efficient attention, and the hybrid form.

Jeevan & Sethi, "Vision Xformers", 2021 (arXiv:2107.02239). 32x32 images become 1,024 tokens and a
class token of width 128 in four pre-norm blocks. Hybrid ViX embeds by three 3x3 convolutions
instead of one linear map per pixel. The ImageNet sizes are timm's ViTs with another attention.

All are timm's `VisionTransformer`; only the attention, the embedding and the scale of the position
embedding differ. Departures of the named models from the paper's rows, which its published counts
show to be unlike each other: every model has heads of width 32, an MLP of width 256 and no query,
key and value bias; the hybrid has a ReLU between its convolutions. The rows themselves are built by
arguments (tests/models/test_paper_rows.py).
"""

from functools import partial
from typing import Any

from torch import nn

from timm_xformers.layers.tokenizer import ConvEmbed
from timm_xformers.models._cfg import PAPER_GEOMETRY, default_configs, small_image_cfg
from timm_xformers.models._register import register_models
from timm_xformers.models._trunk import Trunk, build

__all__ = ["ViX"]


class ViX(Trunk):
    """Vision X-former: images to logits.

    Args:
        stem_act: Put a ReLU between the convolutions of the hybrid's embedding; None where the
            embedding is one linear map.
        pos_embed_std: Deviation of learned positions at the start. Pixel tokens start as one
            intensity times one vector, so positions must be as large as the content (1.0).
        **kwargs: Arguments of `Trunk` and of timm's `VisionTransformer`.

    Raises:
        ValueError: What `Trunk` refuses.
        TypeError: An argument that nobody has.
    """

    def __init__(
        self, *, stem_act: bool | None = None, pos_embed_std: float = 1.0, **kwargs: Any
    ) -> None:
        if stem_act is not None:
            act_layer = nn.ReLU if stem_act else nn.Identity
            kwargs["embed_layer"] = partial(ConvEmbed, act_layer=act_layer)
        super().__init__(pos_embed_std=pos_embed_std, **kwargs)


_cfg = partial(
    small_image_cfg,
    first_conv="patch_embed.proj",
    paper_ids="arXiv:2107.02239",
    paper_name="Vision Xformers: Efficient Attention for Image Classification",
)


def _vix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    defaults = {"attn_layer": attention, "patch_size": 1, "mlp_ratio": 2.0, **PAPER_GEOMETRY}
    return build(ViX, variant, pretrained, defaults, **kwargs)


def _hybrid_vix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    # Positions of the size of what the convolutions give.
    defaults = {"stem_act": True, "pos_embed_std": 0.1}
    return _vix(variant, attention, pretrained, **{**defaults, **kwargs})


def _vix_imagenet(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    """Size of ``vix_{size}_patch16_224_{mechanism}``, read from the name."""
    embed_dim, num_heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[
        variant.split("_")[1]
    ]
    defaults = {
        "attn_layer": attention,
        "patch_size": 16,
        "embed_dim": embed_dim,
        "depth": 12,
        "num_heads": num_heads,
        "pos_embed_std": 0.02,
    }
    return build(ViX, variant, pretrained, defaults, **kwargs)


_RANDOM = "softmax attention estimated from positive random features (FAVOR+)"
_SHIFTED = "shifted in every second block"
_NYSTROM = "Nyström attention, 64 landmarks, residual convolution of 33"
_LINFORMER = "Linformer attention, 64 projected keys and values"
_FEATURES = (16, 32, 64, 128, 256)

# Name: mechanism, and what the model is.
VIX = {
    "vix_softmax": ("softmax", "ViX with exact attention, the baseline."),
    **{
        f"vix_performer_softmax_m{m}": (
            f"performer_softmax_m{m}",
            f"ViX with {_RANDOM}, {m} features.",
        )
        for m in _FEATURES
    },
    **{
        f"vix_performer_relu_m{m}": (
            f"performer_relu_m{m}",
            f"ViX with the relu kernel, {m} features.",
        )
        for m in _FEATURES
    },
    "vix_performer_exp_m64": (
        "performer_exp_m64",
        "ViX with the exponential kernel, 64 features.",
    ),
    "vix_performer_gelu_m64": ("performer_gelu_m64", "ViX with the gelu kernel, 64 features."),
    "vix_performer_elu_m64": ("performer_elu_m64", "ViX with the elu + 1 kernel, 64 features."),
    "vix_performer_learned_m64": (
        "performer_learned_m64",
        "ViX with a learned feature map, 64 features.",
    ),
    "vix_nystrom": ("nystrom_l64_conv33", f"ViX with {_NYSTROM}."),
    "vix_linformer": ("linformer_k64", f"ViX with {_LINFORMER}."),
    **{
        f"vix_local1d_w{w}": (
            f"local1d_w{w}_shifted",
            f"ViX with windows of {w} in the flattened sequence, {_SHIFTED}.",
        )
        for w in (16, 64, 256)
    },
    **{
        f"vix_local2d_w{w}": (
            f"local2d_w{w}_shifted",
            f"ViX with {w}x{w} windows of the grid, {_SHIFTED}.",
        )
        for w in (4, 8, 16)
    },
    "vix_fnet": ("fnet", "ViX with Fourier mixing in place of attention."),
}
HYBRID = {
    "hybrid_vix_softmax": ("softmax", "Hybrid ViX with exact attention."),
    "hybrid_vix_performer_relu_m64": (
        "performer_relu_m64",
        "Hybrid ViX with the relu kernel, 64 features.",
    ),
    "hybrid_vix_performer_softmax_m32": (
        "performer_softmax_m32",
        "Hybrid ViX with positive random features, 32 of them.",
    ),
    "hybrid_vix_nystrom": ("nystrom_l64_conv33", f"Hybrid ViX with {_NYSTROM}."),
    "hybrid_vix_linformer": ("linformer_k64", f"Hybrid ViX with {_LINFORMER}."),
}
IMAGENET = {
    f"vix_{size}_patch16_224_{attention}": (attention, f"ViT-{letters}/16 with {words}.")
    for size, letters in (("tiny", "Ti"), ("small", "S"), ("base", "B"))
    for attention, words in (
        ("performer_relu_m64", "the relu kernel, 64 features"),
        ("performer_softmax_m64", "positive random features, 64 of them"),
        ("nystrom_l64", "Nyström attention, 64 landmarks"),
    )
}

default_cfgs = default_configs(
    {
        **{name: _cfg() for name in VIX},
        **{name: _cfg(first_conv="patch_embed.convs.0") for name in HYBRID},
        **{
            name: _cfg(num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)
            for name in IMAGENET
        },
    }
)
register_models(__name__, _vix, VIX)
register_models(__name__, _hybrid_vix, HYBRID)
register_models(__name__, _vix_imagenet, IMAGENET)
