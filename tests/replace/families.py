"""One small model per family whose attention can be replaced, and per family where it cannot."""

from collections.abc import Callable

import timm
import torch
from timm.layers import Attention, LayerNorm
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

# Two blocks of width 32, images of 2 x 3 patches: no two lengths agree by chance.
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
WIDE = {**SMALL, "img_size": (32, 48)}

Build = Callable[[], nn.Module]


def named(name: str, **kwargs) -> Build:
    return lambda: timm.create_model(name, **{**WIDE, **kwargs})


class Layers(nn.Module):
    """Two layers of timm's attention with what no model of timm's switches on."""

    def __init__(self) -> None:
        super().__init__()
        given = {"attn_head_dim": 12, "gated": True, "scale_norm": True, "norm_layer": LayerNorm}
        self.layers = nn.Sequential(
            *[Attention(32, 2, qkv_bias=True, **given), Attention(32, 2, qk_norm=True, **given)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(2).transpose(1, 2)[..., :32])


FAMILIES: dict[str, Build] = {
    "vit": named("vit_tiny_patch16_224"),
    "vit-norms": named(
        "vit_tiny_patch16_224", reg_tokens=2, init_values=0.1, qk_norm=True, scale_attn_norm=True
    ),
    "vit-parallel-things": named("vit_small_patch16_18x2_224"),
    "vit-parallel-scaling": named(
        "vit_tiny_patch16_224", block_fn=ParallelScalingBlock, qk_norm=True
    ),
    "vit-parallel-no-bias": named(
        "vit_tiny_patch16_224", block_fn=ParallelScalingBlock, qkv_bias=False
    ),
    "deit-distilled": named("deit_tiny_distilled_patch16_224"),
    "deit3": named("deit3_small_patch16_224"),
    "flexivit": named("flexivit_small"),
    "siglip": named("vit_base_patch16_siglip_224"),
    "gated": Layers,
    "eva": named("eva_giant_patch14_224", img_size=(28, 42)),
    "eva02": named("eva02_tiny_patch14_224", img_size=(28, 42), scale_attn_inner=True),
    "eva02-unfused": named("eva02_base_patch14_224", img_size=(28, 42), qk_norm=True),
    "dinov3": named("vit_small_patch16_dinov3"),
    "dinov3-bias": named("vit_small_patch16_dinov3_qkvb"),
    "rope-mixed": named("vit_small_patch16_rope_mixed_224"),
    "rope-registers": named("vit_mediumd_patch16_rope_reg1_gap_256"),
    "grouped-keys": named(
        "vit_small_patch16_dinov3", attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True
    ),
    "naflex": lambda: timm.create_model("naflexvit_base_patch16_gap", **SMALL),
    "naflex-rope": lambda: timm.create_model(
        "naflexvit_base_patch16_gap", rope_type="axial", attn_gated=True, **SMALL
    ),
    "beit-no-bias": named("beit_base_patch16_224", use_rel_pos_bias=False),
    "torchvision": lambda: TorchvisionViT(32, 16, 2, 2, 32, 64, num_classes=3),
    "vix": named("vix_softmax", img_size=(8, 6)),
    "vix-rope": named("vix_softmax", img_size=(8, 6), rope=True),
    "ccx": named("cct_7_3x1_32", img_size=(32, 24)),
    "levix": named("levit_1stage", img_size=(8, 6)),
}

# Model, and words of the refusal.
REFUSED: dict[str, tuple[Build, str]] = {
    "cait": (named("cait_xxs24_224", img_size=32), "TalkingHeadAttn.*maps of its heads"),
    "xcit": (named("xcit_nano_12_p16_224", img_size=32), "XCA.*channels"),
    "hiera": (lambda: timm.create_model("hiera_tiny_224", img_size=64), "MaskUnitAttention"),
    "maxvit": (lambda: timm.create_model("maxvit_rmlp_pico_rw_256"), "Attention2d|AttentionCl"),
    "tnt": (lambda: timm.create_model("tnt_s_legacy_patch16_224", img_size=32), "tnt.Attention"),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "WindowAttention"),
    "levit": (lambda: timm.create_model("levit_128s"), "levit.Attention"),
    "beit": (named("beit_base_patch16_224"), 'BEiT.*relative_bias="drop"'),
    "beit-shared": (
        named("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        "relative_bias",
    ),
    "relpos": (named("vit_relpos_small_patch16_224"), "RelPosAttention.*bias"),
    "differential": (named("vit_tiny_patch16_224", attn_layer="diff"), "DiffAttention"),
    "differential-block": (
        named("vit_tiny_patch16_224", block_fn=DiffParallelScalingBlock),
        "DiffParallelScalingBlock",
    ),
    "fnet": (named("vix_fnet", img_size=(8, 6)), "fnet"),
    "one-key-head": (
        named("vix_linformer", img_size=(8, 6), attn_kwargs={"one_kv_head": True}),
        "shares keys",
    ),
}


def images(model: nn.Module) -> Tensor:
    """Two images for a model of `FAMILIES`, float64."""
    size = (32, 48)
    if isinstance(model, TorchvisionViT):
        size = (32, 32)
    elif hasattr(model, "patch_embed"):
        size = model.patch_embed.img_size
    elif isinstance(model, Layers):
        size = (8, 5)
    channels = 32 if isinstance(model, Layers) else 3
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)


def draw(build: Build) -> nn.Module:
    """A model in float64 whose every parameter counts: those that start at zero, too."""
    torch.manual_seed(0)
    model = build().double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(noise, alpha=0.1)
    return model
