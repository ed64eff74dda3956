"""CCX: compact convolutional transformers with efficient attention.

Hassani et al., "Escaping the big data paradigm with compact transformers", 2021 (arXiv:2104.05704):
a convolutional tokenizer, no class token, sequence pooling. Names ``cc{letter}_{L}_{P}x{C}_{size}``
have L blocks behind C convolutions of P x P pixels; ``cct``, ``ccp``, ``ccn`` and ``ccl`` are the
1,024-token models of Jeevan & Sethi, "Vision Xformers", 2021 (arXiv:2107.02239). The letter is the
mechanism: t exact, p Performer, n Nyström, l Linformer.

`checkpoint_filter_fn` reads the authors' checkpoints. Departures:

- Linear maps start as Xavier's, not at 0.02, which starts slowly at these widths.
- Attention dropout and stochastic depth (0.1 each in the authors' code) belong to the recipe, so
  that models without an attention map compare under equal ones.
- The named ``ccn`` and ``ccl`` have the heads of the others; the paper's rows are built by
  arguments (tests/models/test_paper_rows.py).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from torch import Tensor, nn

from timm_xformers.layers.seq_pool import SeqPool
from timm_xformers.layers.tokenizer import ConvTokenizer
from timm_xformers.models._cfg import PAPER_GEOMETRY, default_configs, small_image_cfg
from timm_xformers.models._register import register_models
from timm_xformers.models._trunk import Trunk, build, filter_trunk

__all__ = ["CCX"]

# Arguments of timm's block that CCT's block has no place for.
_NO_PLACE = ("fix_init", "init_values", "scale_mlp_norm")


class CCXBlock(nn.Module):
    """CCT's block on tokens (B, N, C): the MLP's residual starts behind the second norm.

    ``x = x + attn(norm1(x))``; ``x = norm2(x)``; ``x = x + mlp(x)``. Arguments are those of timm's
    `Block`; the ones that are not named go to the mechanism.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_layer: Callable[..., nn.Module],
        mlp_layer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
        act_layer: Callable[[], nn.Module],
        *,
        mlp_ratio: float = 4.0,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            norm_layer=norm_layer,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            **attention,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            bias=proj_bias,
            drop=proj_drop,
            **dd,
        )
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to the same."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm2(x + self.drop_path1(y))
        x = x + self.drop_path2(self.mlp(x))
        return x


def _block(scale_attn_norm: bool, **options: Any) -> CCXBlock:
    """Block from the arguments of timm's pre-norm block, less those without a place here."""
    taken = {name: value for name, value in options.items() if name not in (*_NO_PLACE, "depth")}
    return CCXBlock(scale_norm=scale_attn_norm, **taken)


class CCX(Trunk):
    """Compact convolutional transformer with a named attention mechanism: images to logits.

    Args:
        conv_kernel: Side P of the tokenizer's filters.
        conv_stride: Their stride.
        num_convs: Number C of convolutions, each with a ReLU and a 3x3 pooling.
        pool_stride: Stride of the pooling.
        global_pool: ``"map"`` for sequence pooling, or another of timm's without a class token.
        pos_embed_std: Deviation of learned positions at the start.
        **kwargs: Arguments of `Trunk` and of timm's `VisionTransformer`. ``pos_embed="sine"`` gives
            the authors' fixed positions, ``"none"`` none.

    Raises:
        ValueError: What `Trunk` refuses.
        TypeError: An argument that nobody has, or that CCT's block has no place for.
    """

    def __init__(
        self,
        *,
        conv_kernel: int = 3,
        conv_stride: int = 1,
        num_convs: int = 2,
        pool_stride: int = 2,
        global_pool: str = "map",
        pos_embed_std: float = 0.2,
        **kwargs: Any,
    ) -> None:
        for name in ("patch_size", *_NO_PLACE):
            if name in kwargs:
                raise TypeError(f"A compact transformer has no place for {name}; leave it out.")

        def tokenizer(bias: bool, patch_size: int, **sizes: Any) -> ConvTokenizer:
            return ConvTokenizer(
                num_convs=num_convs,
                kernel_size=conv_kernel,
                stride=conv_stride,
                pool_stride=pool_stride,
                **sizes,
            )

        super().__init__(
            embed_layer=tokenizer,
            block_fn=_block,
            # timm's word for pooling with learned weights; the layer it would build is another.
            global_pool="avg" if global_pool == "map" else global_pool,
            fc_norm=False,
            class_token=False,
            pos_embed_std=pos_embed_std,
            **kwargs,
        )
        if global_pool == "map":
            self.global_pool = "map"
            weight = next(self.patch_embed.parameters())
            pool: Any = SeqPool(self.embed_dim, device=weight.device, dtype=weight.dtype)
            self.attn_pool = pool


# The authors' names of parts, outermost first, and ours.
_OFFICIAL = (
    (r"^module\.", ""),
    (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"patch_embed.convs.\1."),
    (r"^classifier\.positional_emb$", "pos_embed"),
    (r"^classifier\.attention_pool\.", "attn_pool.score."),
    (r"^classifier\.fc\.", "head."),
    (r"^classifier\.", ""),
    (r"^(blocks\.\d+)\.norm1\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.pre_norm\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.linear([12])\.", r"\1.mlp.fc\2."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint to the model: the authors' names, positions, sequence projections.

    Weights are of this family or of the authors' CCT, bare or under ``"state_dict"``.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if any("tokenizer.conv_layers" in name for name in state_dict):
        renamed = {}
        for name, value in state_dict.items():
            for pattern, ours in _OFFICIAL:
                name = re.sub(pattern, ours, name)
            renamed[name] = value
        state_dict = renamed
        if model.sine or model.pos_embed is None:  # the authors save fixed positions too
            state_dict.pop("pos_embed", None)
    return filter_trunk(state_dict, model)


_cfg = partial(
    small_image_cfg,
    first_conv="patch_embed.convs.0",
    paper_ids="arXiv:2104.05704",
    paper_name="Escaping the Big Data Paradigm with Compact Transformers",
)


_cfg_224 = partial(
    _cfg,
    num_classes=1000,
    input_size=(3, 224, 224),
    crop_pct=0.9,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)


def _cc_1024(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> CCX:
    defaults = {
        "attn_layer": attention,
        "num_convs": 3,
        "pool_stride": 1,
        "mlp_ratio": 4.0,
        **PAPER_GEOMETRY,
    }
    return build(CCX, variant, pretrained, defaults, checkpoint_filter_fn, **kwargs)


def _cc(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> CCX:
    """Geometry of the CCT paper, read from the name."""
    _, depth, convs, _ = variant.split("_")
    kernel, num_convs = (int(n) for n in convs.split("x"))
    embed_dim, num_heads, mlp_ratio = {
        "2": (128, 2, 1.0),
        "4": (128, 2, 1.0),
        "6": (256, 4, 2.0),
        "7": (256, 4, 2.0),
        "14": (384, 6, 3.0),
    }[depth]
    defaults = {
        **PAPER_GEOMETRY,
        "attn_layer": attention,
        "conv_kernel": kernel,
        "conv_stride": max(1, kernel // 2 - 1),
        "num_convs": num_convs,
        "embed_dim": embed_dim,
        "depth": int(depth),
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
    }
    return build(CCX, variant, pretrained, defaults, checkpoint_filter_fn, **kwargs)


_MECHANISMS = {
    "t": ("softmax", "exact attention"),
    "p": ("performer_softmax_m64", "64 positive random features"),
    "n": ("nystrom_l64_conv33", "64 landmarks and a convolution"),
    "l": ("linformer_k64", "64 projected keys"),
}
# Of 64 tokens, 16 landmarks and 32 projected keys are enough.
_FEW = _MECHANISMS | {
    "n": ("nystrom_l16_conv33", "16 landmarks and a convolution"),
    "l": ("linformer_k32", "32 projected keys"),
}
_1024_TOKENS = "Compact transformer on 1,024 tokens with"

# Name: mechanism, and what the model is.
PAPER = {
    "cct": ("softmax", f"{_1024_TOKENS} exact attention, the baseline."),
    "ccp": ("performer_softmax_m64", f"{_1024_TOKENS} 64 positive random features (Performer)."),
    "ccn": ("nystrom_l64_conv33", f"{_1024_TOKENS} 64 landmarks and a convolution (Nyström)."),
    "ccl": ("linformer_k64", f"{_1024_TOKENS} 64 projected keys (Linformer)."),
}
COMPACT = {
    f"cc{letter}_{depth}_{convs}_{pixels}": (
        mechanisms[letter][0],
        f"CCT-{depth}/{convs}, {tokens} tokens, {mechanisms[letter][1]}.",
    )
    for depth, convs, pixels, tokens, letters, mechanisms in (
        (2, "3x2", 32, 64, "tpnl", _FEW),
        (4, "3x2", 32, 64, "tpnl", _FEW),
        (6, "3x1", 32, 256, "tpnl", _MECHANISMS),
        (7, "3x1", 32, 256, "tpnl", _MECHANISMS),
        (14, "7x2", 224, 196, "tpn", _MECHANISMS),
    )
    for letter in letters
}

default_cfgs = default_configs(
    {name: _cfg_224() if name.endswith("_224") else _cfg() for name in PAPER | COMPACT}
)
register_models(__name__, _cc_1024, PAPER)
register_models(__name__, _cc, COMPACT)
