"""LeViX: LeViT in one stage of 1,024 tokens, with efficient attention.

Graham et al., "LeViT", 2021 (arXiv:2104.01136): maps with a BatchNorm inside instead of pre-norms,
a non-linearity before the output projection, blocks that start as the identity. Jeevan & Sethi,
"Vision Xformers", 2021 (arXiv:2107.02239), section 3: one stage of four blocks, width 128, stride
1, attention replaced, no class token.

The parts are timm's LeViT. Departures of the named models from the paper's rows, which its
published counts show to be unlike each other (its Performer and Linformer have no norm at all):

- All four have LeViT's normalisation, in the embedding, the attention, the MLP and the head.
- Hardswish everywhere, as in LeViT.
- Positions are learned and added to the tokens. The paper takes LeViT's bias per distance out,
  which needs the softmax map, and leaves zero padding as the only sign of place.

``norm``, ``stem_act``, ``act_layer`` and ``pos_embed`` give the rows back
(tests/models/test_paper_rows.py).
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, Mlp, get_act_layer
from timm.models.levit import ConvNorm, LevitMlp, LinearNorm, NormLinear
from torch import Tensor, nn

from timm_xformers.layers.tokenizer import ConvEmbed
from timm_xformers.models._cfg import PAPER_GEOMETRY, default_configs, small_image_cfg
from timm_xformers.models._register import register_models
from timm_xformers.models._trunk import Trunk, build

__all__ = ["LeViX"]

_NORMS = ("all", "attention", "none")
# Arguments of timm's pre-norm block that LeViT's block has no place for.
_NO_PLACE = (
    *("fix_init", "init_values", "mlp_layer", "norm_layer"),
    *("proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm"),
)


class Classifier(NormLinear):
    """timm's norm and linear map, (B, C) to logits, without a dropout: the trunk has its own.

    (Extractors of graphs would take a node head.drop for the trunk's head_drop.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C) to logits (B, num_classes)."""
        out: Tensor = self.linear(self.bn(x))
        return out


class LeViXBlock(nn.Module):
    """``x + attn(x)``, then ``x + mlp(x)``, on tokens (B, N, C); norms lie inside the maps.

    Arguments are those of timm's `Block`, and ``norm``: where BatchNorms are, see `LeViX`. The
    mechanism's projections are replaced by LeViT's, and ``act_layer`` stands before the output
    projection too.

    Raises:
        ValueError: A mechanism without projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_layer: Callable[..., nn.Module],
        *,
        norm: str = "all",
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        act_layer: Callable[[], nn.Module] = nn.Hardswish,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drops = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        attn: Any = attn_layer(dim, num_heads=num_heads, qkv_bias=qkv_bias, **drops, **dd)
        if not hasattr(attn, "qkv"):
            raise ValueError("LeViX needs queries, keys and values; fnet has none.")
        if norm != "none":
            attn_dim = attn.proj.in_features
            attn.qkv = LinearNorm(dim, attn.qkv.out_features, **dd)
            out = LinearNorm(attn_dim, dim, **dd)
            if norm == "attention":  # the paper's output map has a bias before its norm
                out.linear = nn.Linear(attn_dim, dim, **dd)
            attn.proj = nn.Sequential(OrderedDict(act=act_layer(), ln=out))
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        make_mlp: Callable[..., nn.Module] = LevitMlp if norm == "all" else Mlp
        self.mlp = make_mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.start_as_identity()

    def start_as_identity(self) -> None:
        """Set the last norm of each branch to zero, as LeViT does."""
        ends = [getattr(self.attn.proj, "ln", None), getattr(self.mlp, "ln2", None)]
        for end in ends:
            if end is not None:
                nn.init.zeros_(end.bn.weight)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to the same."""
        x = x + self.drop_path1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        x = x + self.drop_path2(self.mlp(x))
        return x


def _block(norm: str, **options: Any) -> LeViXBlock:
    """Block from the arguments of timm's pre-norm block, less those without a place here."""
    taken = {name: value for name, value in options.items() if name not in (*_NO_PLACE, "depth")}
    return LeViXBlock(norm=norm, **taken)


class LeViX(Trunk):
    """LeViT in one stage with a named attention mechanism: images to logits.

    Args:
        norm: Where BatchNorms are: ``"all"`` (LeViT: in every map and before the classifier),
            ``"attention"`` (the paper's LeViT and LeViN) or ``"none"`` (its LeViP and LeViL).
        stem_act: Put ``act_layer`` between the convolutions of the embedding.
        act_layer: Non-linearity, by timm's name.
        global_pool: ``"avg"``, or another of timm's poolings without a class token.
        **kwargs: Arguments of `Trunk` and of timm's `VisionTransformer`.

    Raises:
        ValueError: Unknown ``norm``, or what `Trunk` refuses.
        TypeError: An argument that nobody has, or that LeViT's block has no place for.
    """

    def __init__(
        self,
        *,
        norm: str = "all",
        stem_act: bool = True,
        act_layer: str = "hard_swish",
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(f"norm={norm!r} is unknown; use {', '.join(_NORMS)}.")
        for name in _NO_PLACE:
            if name in kwargs:
                raise TypeError(f"LeViT's block has no place for {name}; leave it out.")
        self.norm_place = norm
        super().__init__(
            embed_layer=partial(
                ConvEmbed,
                act_layer=get_act_layer(act_layer) if stem_act else nn.Identity,
                conv_layer=ConvNorm if norm == "all" else None,
            ),
            block_fn=partial(_block, norm),
            act_layer=act_layer,
            global_pool=global_pool,
            class_token=False,
            final_norm=False,
            **kwargs,
        )
        self.reset_classifier(self.num_classes)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm does; blocks start as the identity."""
        super().init_weights(mode, needs_reset)
        for block in self.blocks.children():
            cast(LeViXBlock, block).start_as_identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, 0 for none, and optionally the pooling."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.norm_place == "all":
            weight = next(self.head.parameters())
            head: Any = Classifier(
                self.num_features, num_classes, device=weight.device, dtype=weight.dtype
            )
            self.head = head.train(self.training)


_cfg = partial(
    small_image_cfg,
    first_conv="patch_embed.convs.0.linear",
    classifier="head.linear",
    paper_ids="arXiv:2107.02239",
    paper_name="Vision Xformers: Efficient Attention for Image Classification",
)


def _levix(variant: str, attention: str, pretrained: bool, **kwargs: Any) -> LeViX:
    defaults = {
        "attn_layer": attention,
        "patch_size": 1,
        "mlp_ratio": 2.0,
        "pos_embed_std": 0.2,
        **PAPER_GEOMETRY,
    }
    return build(LeViX, variant, pretrained, defaults, **kwargs)


_ONE_STAGE = "LeViT in one stage with"
# Name: mechanism, and what the model is.
MODELS = {
    "levit_1stage": ("softmax", f"{_ONE_STAGE} exact attention, the baseline."),
    "levip": (
        "performer_softmax_m64",
        f"{_ONE_STAGE} Performer attention: positive random features, 64 of them.",
    ),
    "levin": (
        "nystrom_l64_conv33",
        f"{_ONE_STAGE} Nyström attention, 64 landmarks, residual convolution of 33.",
    ),
    "levil": (
        "linformer_k64",
        f"{_ONE_STAGE} Linformer attention, 64 projected keys and values.",
    ),
}

default_cfgs = default_configs({name: _cfg() for name in MODELS})
register_models(__name__, _levix, MODELS)
