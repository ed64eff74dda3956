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

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.layout import set_token_layout
from timm_xformers.layers.linformer import resample_projection
from timm_xformers.layers.performer import redraw_features
from timm_xformers.layers.rotary import RotaryPositions
from timm_xformers.layers.tokenizer import ConvEmbed
from timm_xformers.models._register import register_model

__all__ = ["ViX"]


class ViX(VisionTransformer):
    """timm's `VisionTransformer` with a named attention mechanism: images to logits.

    Args:
        attn_layer: A name of `timm_xformers.list_attention`.
        attn_kwargs: Arguments of the mechanism beside the name's own, e.g. ``num_features``.
        attn_head_dim: Head width; ``embed_dim // num_heads`` if None.
        rope: Turn queries and keys by rotary positions as well.
        pos_embed_std: Deviation of the initial position embedding. Pixel tokens start as one
            intensity times one vector, so positions must be as large as the content (1.0).
        feature_seed: Seed of the random features, one draw per layer.
        stem_act: Put a ReLU between the convolutions of the hybrid's embedding; None where the
            embedding has no such choice.
        **kwargs: Arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: An unknown mechanism, an image that the patches do not divide, or an option
            that the mechanism cannot honour.
        TypeError: An argument that neither this class nor timm's has.
    """

    def __init__(
        self,
        *,
        attn_layer: str,
        attn_kwargs: Mapping[str, Any] | None = None,
        attn_head_dim: int | None = None,
        rope: bool = False,
        pos_embed_std: float = 1.0,
        feature_seed: int = 0,
        stem_act: bool | None = None,
        **kwargs: Any,
    ) -> None:
        settings = dict(attn_kwargs or {})
        if attn_head_dim is not None:
            settings["attn_head_dim"] = attn_head_dim
        self.pos_embed_std = pos_embed_std
        attention = attention_class(attn_layer, **settings)
        _check_sizes(attention, rope, **kwargs)
        if stem_act is not None:
            kwargs["embed_layer"] = ConvEmbed if stem_act else _LinearConvEmbed
        super().__init__(attn_layer=attention, **kwargs)
        self.rope = rope
        set_token_layout(self)
        redraw_features(self, feature_seed)
        self._set_rope()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm does, then draw positions of this family's size."""
        super().init_weights(mode, needs_reset)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=self.pos_embed_std)

    def _set_rope(self) -> None:
        if not self.rope:
            return
        attentions: list[Any] = [block.attn for block in self.blocks]
        if not hasattr(attentions[0], "rope"):
            raise ValueError("fnet has no queries and keys for rotary positions; use rope=False.")
        weight = attentions[0].proj.weight
        rope = RotaryPositions(
            attentions[0].head_dim,
            self.patch_embed.grid_size,
            self.num_prefix_tokens,
            device=weight.device,
        )
        for attention in attentions:
            attention.rope = rope  # one table of angles for all

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size: positions and sequence projections are interpolated."""
        if img_size is not None:
            _check_img_size(img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size)
        set_token_layout(self)
        self._set_rope()


class _LinearConvEmbed(ConvEmbed):
    """The paper's convolutions, with nothing between them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, act=False, **kwargs)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_img_size(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuse what timm would cut off without a word."""
    for side, patch in zip(_pair(img_size), _pair(patch_size), strict=True):
        if side % patch or side < patch:
            near = max(side - side % patch, patch)
            raise ValueError(
                f"img_size={side} is not a multiple of patch_size={patch}; use {near} or "
                f"{near + patch}."
            )


def _check_sizes(
    attention: type[nn.Module],
    rope: bool,
    img_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    dynamic_img_size: bool = False,
    dynamic_img_pad: bool = False,
    patch_drop_rate: float = 0.0,
    **kwargs: Any,
) -> None:
    """Refuse combinations that would fail later or, worse, not fail at all."""
    if not dynamic_img_pad:
        _check_img_size(img_size, patch_size)
    fixed = rope or getattr(attention, "needs_fixed_grid", False)
    mechanism = "rotary positions" if rope else getattr(attention, "mechanism", "this attention")
    if dynamic_img_size and fixed:
        raise ValueError(
            f"{mechanism} is built for one grid of tokens, so dynamic_img_size=True cannot be "
            "honoured; build with img_size=..., or call set_input_size()."
        )
    if patch_drop_rate > 0 and (fixed or getattr(attention, "mechanism", "") == "local1d"):
        raise ValueError(
            f"{mechanism} needs every token in its place, so patch_drop_rate={patch_drop_rate} "
            "cannot be honoured; use drop_path_rate."
        )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint of another image size to the model: positions and sequence projections.

    Args:
        state_dict: Weights of this family, or of timm's ViTs.
        model: The model that will load them.

    Returns:
        Weights with the model's shapes.
    """
    own = model.state_dict()
    prefix: int = model.num_prefix_tokens
    out: dict[str, Tensor] = dict(vit_filter_fn(state_dict, model))
    for name, value in out.items():
        if not name.endswith(("attn.proj_k", "attn.proj_v")) or name not in own:
            continue
        if value.shape[0] == own[name].shape[0] and value.shape != own[name].shape:
            side = int((value.shape[1] - prefix) ** 0.5 + 0.5)
            if side * side != value.shape[1] - prefix:
                raise ValueError(
                    f"{name} is for {value.shape[1] - prefix} tokens, which is not a square grid; "
                    "load it at its own img_size, then call set_input_size()."
                )
            out[name] = resample_projection(
                value, model.patch_embed.grid_size, (side, side), prefix
            )
    return out


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2107.02239",
        "paper_name": "Vision Xformers: Efficient Attention for Image Classification",
        **kwargs,
    }


def _hybrid_cfg() -> dict[str, Any]:
    return _cfg(first_conv="patch_embed.convs.0")


def _imagenet_cfg() -> dict[str, Any]:
    return _cfg(num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)


default_cfgs = generate_default_cfgs(
    {
        "vix_softmax": _cfg(),
        "vix_performer_softmax_m16": _cfg(),
        "vix_performer_softmax_m32": _cfg(),
        "vix_performer_softmax_m64": _cfg(),
        "vix_performer_softmax_m128": _cfg(),
        "vix_performer_softmax_m256": _cfg(),
        "vix_performer_relu_m16": _cfg(),
        "vix_performer_relu_m32": _cfg(),
        "vix_performer_relu_m64": _cfg(),
        "vix_performer_relu_m128": _cfg(),
        "vix_performer_relu_m256": _cfg(),
        "vix_performer_exp_m64": _cfg(),
        "vix_performer_gelu_m64": _cfg(),
        "vix_performer_elu_m64": _cfg(),
        "vix_performer_learned_m64": _cfg(),
        "vix_nystrom": _cfg(),
        "vix_linformer": _cfg(),
        "vix_local1d_w64": _cfg(),
        "vix_local2d_w8": _cfg(),
        "vix_fnet": _cfg(),
        "hybrid_vix_softmax": _hybrid_cfg(),
        "hybrid_vix_performer_relu_m64": _hybrid_cfg(),
        "hybrid_vix_performer_softmax_m32": _hybrid_cfg(),
        "hybrid_vix_nystrom": _hybrid_cfg(),
        "hybrid_vix_linformer": _hybrid_cfg(),
        "vix_tiny_patch16_224_performer_relu_m64": _imagenet_cfg(),
        "vix_tiny_patch16_224_performer_softmax_m64": _imagenet_cfg(),
        "vix_tiny_patch16_224_nystrom_l64": _imagenet_cfg(),
        "vix_small_patch16_224_performer_relu_m64": _imagenet_cfg(),
        "vix_small_patch16_224_performer_softmax_m64": _imagenet_cfg(),
        "vix_small_patch16_224_nystrom_l64": _imagenet_cfg(),
        "vix_base_patch16_224_performer_relu_m64": _imagenet_cfg(),
        "vix_base_patch16_224_performer_softmax_m64": _imagenet_cfg(),
        "vix_base_patch16_224_nystrom_l64": _imagenet_cfg(),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> ViX:
    # features_only goes through forward_intermediates ("getter"), which gives NCHW maps.
    out_indices = kwargs.pop("out_indices", 3)
    model: ViX = build_model_with_cfg(
        ViX,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )
    return model


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
    return _create(variant, pretrained, defaults, **kwargs)


def _hybrid_vix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> ViX:
    # Positions of the size of what the convolutions give.
    defaults = {"stem_act": True, "pos_embed_std": 0.1}
    return _vix(variant, attention, pretrained, **{**defaults, **kwargs})


def _vix_imagenet(variant: str, attention: str, size: str, pretrained: bool, **kwargs: Any) -> ViX:
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
    return _create(variant, pretrained, defaults, **kwargs)


@register_model
def vix_softmax(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention, the baseline."""
    return _vix("vix_softmax", "softmax", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m16(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention through positive random features (FAVOR+), 16 features."""
    return _vix("vix_performer_softmax_m16", "performer_softmax_m16", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m32(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention through positive random features (FAVOR+), 32 features."""
    return _vix("vix_performer_softmax_m32", "performer_softmax_m32", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention through positive random features (FAVOR+), 64 features."""
    return _vix("vix_performer_softmax_m64", "performer_softmax_m64", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m128(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention through positive random features (FAVOR+), 128 features."""
    return _vix("vix_performer_softmax_m128", "performer_softmax_m128", pretrained, **kwargs)


@register_model
def vix_performer_softmax_m256(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with exact attention through positive random features (FAVOR+), 256 features."""
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
def vix_local1d_w64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with windows of 64 in the flattened sequence, shifted in every second block."""
    return _vix("vix_local1d_w64", "local1d_w64_shifted", pretrained, **kwargs)


@register_model
def vix_local2d_w8(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViX with 8x8 windows of the grid, shifted in every second block."""
    return _vix("vix_local2d_w8", "local2d_w8_shifted", pretrained, **kwargs)


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
    return _vix_imagenet(
        "vix_tiny_patch16_224_performer_relu_m64",
        "performer_relu_m64",
        "tiny",
        pretrained,
        **kwargs,
    )


@register_model
def vix_tiny_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-Ti/16 with positive random features, 64 of them."""
    return _vix_imagenet(
        "vix_tiny_patch16_224_performer_softmax_m64",
        "performer_softmax_m64",
        "tiny",
        pretrained,
        **kwargs,
    )


@register_model
def vix_tiny_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-Ti/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet(
        "vix_tiny_patch16_224_nystrom_l64", "nystrom_l64", "tiny", pretrained, **kwargs
    )


@register_model
def vix_small_patch16_224_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with the relu kernel, 64 features."""
    return _vix_imagenet(
        "vix_small_patch16_224_performer_relu_m64",
        "performer_relu_m64",
        "small",
        pretrained,
        **kwargs,
    )


@register_model
def vix_small_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with positive random features, 64 of them."""
    return _vix_imagenet(
        "vix_small_patch16_224_performer_softmax_m64",
        "performer_softmax_m64",
        "small",
        pretrained,
        **kwargs,
    )


@register_model
def vix_small_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-S/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet(
        "vix_small_patch16_224_nystrom_l64", "nystrom_l64", "small", pretrained, **kwargs
    )


@register_model
def vix_base_patch16_224_performer_relu_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with the relu kernel, 64 features."""
    return _vix_imagenet(
        "vix_base_patch16_224_performer_relu_m64",
        "performer_relu_m64",
        "base",
        pretrained,
        **kwargs,
    )


@register_model
def vix_base_patch16_224_performer_softmax_m64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with positive random features, 64 of them."""
    return _vix_imagenet(
        "vix_base_patch16_224_performer_softmax_m64",
        "performer_softmax_m64",
        "base",
        pretrained,
        **kwargs,
    )


@register_model
def vix_base_patch16_224_nystrom_l64(pretrained: bool = False, **kwargs: Any) -> ViX:
    """ViT-B/16 with Nyström attention, 64 landmarks."""
    return _vix_imagenet(
        "vix_base_patch16_224_nystrom_l64", "nystrom_l64", "base", pretrained, **kwargs
    )
