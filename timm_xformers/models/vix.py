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
from timm_xformers.models._cfg import default_configs, small_image_cfg
from timm_xformers.models._register import register_model
from timm_xformers.models._trunk import Trunk, build, check_img_size

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
        ValueError: An image that the patches do not divide, or what `Trunk` refuses.
        TypeError: An argument that nobody has.
    """

    def __init__(
        self, *, stem_act: bool | None = None, pos_embed_std: float = 1.0, **kwargs: Any
    ) -> None:
        if not kwargs.get("dynamic_img_pad", False):
            check_img_size(kwargs.get("img_size", 224), kwargs.get("patch_size", 16))
        if stem_act is not None:
            act_layer = nn.ReLU if stem_act else nn.Identity
            kwargs["embed_layer"] = partial(ConvEmbed, act_layer=act_layer)
        super().__init__(pos_embed_std=pos_embed_std, **kwargs)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size: positions and sequence projections are interpolated."""
        if img_size is not None:
            check_img_size(img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return small_image_cfg(
        **{
            "first_conv": "patch_embed.proj",
            "paper_ids": "arXiv:2107.02239",
            "paper_name": "Vision Xformers: Efficient Attention for Image Classification",
            **kwargs,
        }
    )


def _imagenet_cfg() -> dict[str, Any]:
    return _cfg(num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)


default_cfgs = default_configs(
    {
        **{f"vix_{name}": _cfg() for name in ("softmax", "nystrom", "linformer", "fnet")},
        **{f"vix_performer_softmax_m{m}": _cfg() for m in (16, 32, 64, 128, 256)},
        **{f"vix_performer_relu_m{m}": _cfg() for m in (16, 32, 64, 128, 256)},
        **{f"vix_performer_{kernel}_m64": _cfg() for kernel in ("exp", "gelu", "elu", "learned")},
        **{f"vix_local1d_w{w}": _cfg() for w in (16, 64, 256)},
        **{f"vix_local2d_w{w}": _cfg() for w in (4, 8, 16)},
        **{
            f"hybrid_vix_{mechanism}": _cfg(first_conv="patch_embed.convs.0")
            for mechanism in (
                *("softmax", "performer_relu_m64", "performer_softmax_m32"),
                *("nystrom", "linformer"),
            )
        },
        **{
            f"vix_{size}_patch16_224_{mechanism}": _imagenet_cfg()
            for size in ("tiny", "small", "base")
            for mechanism in ("performer_relu_m64", "performer_softmax_m64", "nystrom_l64")
        },
    }
)


def _vix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    defaults = {
        "attn_layer": attention,
        "img_size": 32,
        "patch_size": 1,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "qkv_bias": False,
        # timm's name for Xavier: at this width its usual 0.02 is a fifth of that, and training
        # starts slowly.
        "weight_init": "moco",
    }
    return build(ViX, variant, pretrained, defaults, **kwargs)


def _hybrid_vix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    # Positions of the size of what the convolutions give.
    defaults = {"stem_act": True, "pos_embed_std": 0.1}
    return _vix(variant, attention, pretrained, **{**defaults, **kwargs})


def _vix_imagenet(variant: str, pretrained: bool, **kwargs: Any) -> ViX:
    """Size and mechanism of ``vix_{size}_patch16_224_{mechanism}``, read from the name."""
    _, size, _, _, attention = variant.split("_", 4)
    embed_dim, num_heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[size]
    defaults = {
        "attn_layer": attention,
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": embed_dim,
        "depth": 12,
        "num_heads": num_heads,
        "pos_embed_std": 0.02,
    }
    return build(ViX, variant, pretrained, defaults, **kwargs)


@register_model
def vix_softmax(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention, the baseline."""
    return _vix("vix_softmax", "softmax", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m16(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with softmax attention estimated from positive random features (FAVOR+), 16 features."""
    return _vix("vix_performer_softmax_m16", "performer_softmax_m16", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m32(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with softmax attention estimated from positive random features (FAVOR+), 32 features."""
    return _vix("vix_performer_softmax_m32", "performer_softmax_m32", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with softmax attention estimated from positive random features (FAVOR+), 64 features."""
    return _vix("vix_performer_softmax_m64", "performer_softmax_m64", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m128(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with softmax attention estimated from positive random features (FAVOR+), 128 features."""
    return _vix("vix_performer_softmax_m128", "performer_softmax_m128", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m256(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with softmax attention estimated from positive random features (FAVOR+), 256 features."""
    return _vix("vix_performer_softmax_m256", "performer_softmax_m256", pretrained, **kwargs)


@register_model
def vix_performer_relu_m16(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the relu kernel, 16 features."""
    return _vix("vix_performer_relu_m16", "performer_relu_m16", pretrained, **kwargs)


@register_model
def vix_performer_relu_m32(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the relu kernel, 32 features."""
    return _vix("vix_performer_relu_m32", "performer_relu_m32", pretrained, **kwargs)


@register_model
def vix_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the relu kernel, 64 features."""
    return _vix("vix_performer_relu_m64", "performer_relu_m64", pretrained, **kwargs)


@register_model
def vix_performer_relu_m128(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the relu kernel, 128 features."""
    return _vix("vix_performer_relu_m128", "performer_relu_m128", pretrained, **kwargs)


@register_model
def vix_performer_relu_m256(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the relu kernel, 256 features."""
    return _vix("vix_performer_relu_m256", "performer_relu_m256", pretrained, **kwargs)


@register_model
def vix_performer_exp_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the exponential kernel, 64 features."""
    return _vix("vix_performer_exp_m64", "performer_exp_m64", pretrained, **kwargs)


@register_model
def vix_performer_gelu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the gelu kernel, 64 features."""
    return _vix("vix_performer_gelu_m64", "performer_gelu_m64", pretrained, **kwargs)


@register_model
def vix_performer_elu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with the elu + 1 kernel, 64 features."""
    return _vix("vix_performer_elu_m64", "performer_elu_m64", pretrained, **kwargs)


@register_model
def vix_performer_learned_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with a learned feature map, 64 features."""
    return _vix("vix_performer_learned_m64", "performer_learned_m64", pretrained, **kwargs)


@register_model
def vix_nystrom(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with Nyström attention, 64 landmarks, residual convolution of 33."""
    return _vix("vix_nystrom", "nystrom_l64_conv33", pretrained, **kwargs)


@register_model
def vix_linformer(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with Linformer attention, 64 projected keys and values."""
    return _vix("vix_linformer", "linformer_k64", pretrained, **kwargs)


@register_model
def vix_local1d_w16(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with windows of 16 in the flattened sequence, shifted in every second block."""
    return _vix("vix_local1d_w16", "local1d_w16_shifted", pretrained, **kwargs)


@register_model
def vix_local1d_w64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with windows of 64 in the flattened sequence, shifted in every second block."""
    return _vix("vix_local1d_w64", "local1d_w64_shifted", pretrained, **kwargs)


@register_model
def vix_local1d_w256(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with windows of 256 in the flattened sequence, shifted in every second block."""
    return _vix("vix_local1d_w256", "local1d_w256_shifted", pretrained, **kwargs)


@register_model
def vix_local2d_w4(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with 4x4 windows of the grid, shifted in every second block."""
    return _vix("vix_local2d_w4", "local2d_w4_shifted", pretrained, **kwargs)


@register_model
def vix_local2d_w8(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with 8x8 windows of the grid, shifted in every second block."""
    return _vix("vix_local2d_w8", "local2d_w8_shifted", pretrained, **kwargs)


@register_model
def vix_local2d_w16(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with 16x16 windows of the grid, shifted in every second block."""
    return _vix("vix_local2d_w16", "local2d_w16_shifted", pretrained, **kwargs)


@register_model
def vix_fnet(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with Fourier mixing in place of attention."""
    return _vix("vix_fnet", "fnet", pretrained, **kwargs)


@register_model
def hybrid_vix_softmax(pretrained: bool = False, **kwargs: Any) -> ViX:
    """Hybrid ViX with exact attention."""
    return _hybrid_vix("hybrid_vix_softmax", "softmax", pretrained, **kwargs)


@register_model
def hybrid_vix_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """Hybrid ViX with the relu kernel, 64 features."""
    return _hybrid_vix("hybrid_vix_performer_relu_m64", "performer_relu_m64", pretrained, **kwargs)


@register_model
def hybrid_vix_performer_softmax_m32(pretrained: bool = False, **kwargs: Any) -> ViX:
    """Hybrid ViX with positive random features, 32 of them."""
    return _hybrid_vix(
        "hybrid_vix_performer_softmax_m32", "performer_softmax_m32", pretrained, **kwargs
    )


@register_model
def hybrid_vix_nystrom(pretrained: bool = False, **kwargs: Any) -> ViX:
    """Hybrid ViX with Nyström attention, 64 landmarks, residual convolution of 33."""
    return _hybrid_vix("hybrid_vix_nystrom", "nystrom_l64_conv33", pretrained, **kwargs)


@register_model
def hybrid_vix_linformer(pretrained: bool = False, **kwargs: Any) -> ViX:
    """Hybrid ViX with Linformer attention, 64 projected keys and values."""
    return _hybrid_vix("hybrid_vix_linformer", "linformer_k64", pretrained, **kwargs)


@register_model
def vix_tiny_patch16_224_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-Ti/16 with the relu kernel, 64 features."""
    return _vix_imagenet("vix_tiny_patch16_224_performer_relu_m64", pretrained, **kwargs)


@register_model
def vix_tiny_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-Ti/16 with positive random features, 64 of them."""
    return _vix_imagenet("vix_tiny_patch16_224_performer_softmax_m64", pretrained, **kwargs)


@register_model
def vix_tiny_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-Ti/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet("vix_tiny_patch16_224_nystrom_l64", pretrained, **kwargs)


@register_model
def vix_small_patch16_224_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with the relu kernel, 64 features."""
    return _vix_imagenet("vix_small_patch16_224_performer_relu_m64", pretrained, **kwargs)


@register_model
def vix_small_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with positive random features, 64 of them."""
    return _vix_imagenet("vix_small_patch16_224_performer_softmax_m64", pretrained, **kwargs)


@register_model
def vix_small_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet("vix_small_patch16_224_nystrom_l64", pretrained, **kwargs)


@register_model
def vix_base_patch16_224_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with the relu kernel, 64 features."""
    return _vix_imagenet("vix_base_patch16_224_performer_relu_m64", pretrained, **kwargs)


@register_model
def vix_base_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with positive random features, 64 of them."""
    return _vix_imagenet("vix_base_patch16_224_performer_softmax_m64", pretrained, **kwargs)


@register_model
def vix_base_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet("vix_base_patch16_224_nystrom_l64", pretrained, **kwargs)
