"""What the families on timm's `VisionTransformer` share: a mechanism by name, and positions.

A family is this trunk with its own embedding, block or head; `build` is its entry points' way to
timm's builder.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from timm.layers import PatchDropout
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from timm_xformers.layers.factory import attention_class
from timm_xformers.layers.layout import set_token_layout
from timm_xformers.layers.linformer import resample_projection
from timm_xformers.layers.performer import redraw_features
from timm_xformers.layers.positions import sinusoid
from timm_xformers.layers.rotary import RotaryPositions
from timm_xformers.layers.tokenizer import check_img_size
from timm_xformers.models._cfg import choose_weights, usual_input

__all__ = ["Trunk", "build", "filter_trunk", "fit_projections"]

Model = TypeVar("Model", bound=nn.Module)


class Trunk(VisionTransformer):
    """timm's `VisionTransformer` with a named attention mechanism: images to logits.

    Args:
        attn_layer: A name of `timm_xformers.list_attention`.
        attn_kwargs: Arguments of the mechanism beside the name's own, e.g. ``num_features``.
        attn_head_dim: Head width; ``embed_dim // num_heads`` if None.
        pos_embed: Positions added to the tokens: ``"learn"``, ``"sine"`` (fixed) or ``"none"``.
        pos_embed_std: Deviation of learned positions at the start.
        rope: Turn queries and keys by rotary positions as well.
        feature_seed: Seed of the random features, one draw per layer.
        **kwargs: Arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: An unknown mechanism or kind of position, an image that the patches do not
            divide, or an option that the mechanism cannot honour.
        TypeError: An argument that neither this class nor timm's has.
    """

    def __init__(
        self,
        *,
        attn_layer: str,
        attn_kwargs: Mapping[str, Any] | None = None,
        attn_head_dim: int | None = None,
        pos_embed: str = "learn",
        pos_embed_std: float = 0.02,
        rope: bool = False,
        feature_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if pos_embed not in ("learn", "sine", "none"):
            raise ValueError(f"pos_embed={pos_embed!r} is unknown; use learn, sine or none.")
        settings = dict(attn_kwargs or {})
        if attn_head_dim is not None:
            settings["attn_head_dim"] = attn_head_dim
        attention = attention_class(attn_layer, **settings)
        _check_mechanism(
            attention,
            rope,
            kwargs.get("dynamic_img_size", False),
            kwargs.get("patch_drop_rate", 0.0),
        )
        self.pos_embed_std = pos_embed_std
        self.sine = pos_embed == "sine"
        super().__init__(
            attn_layer=attention, pos_embed="none" if pos_embed == "none" else "learn", **kwargs
        )
        if not kwargs.get("dynamic_img_pad", False):
            self._check_size(self.patch_embed.img_size)
        self.attn_layer = attn_layer
        self.rope = rope
        if isinstance(layer := self.patch_drop, PatchDropout):
            layer.ordered = True  # Nyström's segments and convolution follow the sequence
        self._fix_positions()
        set_token_layout(self)
        redraw_features(self, feature_seed)
        self._set_rope()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm does, then set the positions."""
        super().init_weights(mode, needs_reset)
        if self.pos_embed is not None and not self.sine:
            nn.init.normal_(self.pos_embed, std=self.pos_embed_std)
        self.init_non_persistent_buffers()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would only pull to zero."""
        spared: set[str] = super().no_weight_decay()
        return spared & {name for name, _ in self.named_parameters()}

    def init_non_persistent_buffers(self) -> None:
        """Compute what checkpoints do not hold: fixed positions."""
        table: Any = self.pos_embed
        if self.sine:
            with torch.no_grad():
                table.copy_(sinusoid(*table.shape[1:]))

    def _fix_positions(self) -> None:
        """Turn timm's position parameter into a table that is neither trained nor saved."""
        table: Any = self.pos_embed
        if self.sine:
            length, dim = table.shape[1:]
            fixed = sinusoid(length, dim, table.device).to(table.dtype)
            del self.pos_embed
            self.register_buffer("pos_embed", fixed, persistent=False)

    def _set_rope(self) -> None:
        if not self.rope:
            return
        attentions: list[Any] = [block.attn for block in self.blocks]
        if not hasattr(attentions[0], "rope"):
            raise ValueError(
                f"{self.attn_layer} has no queries and keys for rotary positions; use rope=False."
            )
        rope = RotaryPositions(
            attentions[0].head_dim,
            self.patch_embed.grid_size,
            self.num_prefix_tokens,
            device=next(attentions[0].parameters()).device,
        )
        for attention in attentions:
            attention.rope = rope  # one table of angles for all

    def _check_size(self, img_size: Any, patch_size: Any = None) -> None:
        own = getattr(self.patch_embed, "patch_size", None)
        if img_size is not None and own is not None:
            check_img_size(img_size, patch_size or own)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size: positions and sequence projections are interpolated."""
        self._check_size(img_size, patch_size)
        super().set_input_size(img_size, patch_size)
        self._fix_positions()
        set_token_layout(self)
        self._set_rope()


def _check_mechanism(
    attention: type[nn.Module], rope: bool, dynamic_img_size: bool, patch_drop_rate: float
) -> None:
    """Refuse combinations that would fail later or, worse, not fail at all."""
    fixed = rope or getattr(attention, "needs_fixed_grid", False)
    mechanism = "rotary positions" if rope else getattr(attention, "mechanism", "this attention")
    if getattr(attention, "convolves", False):
        mechanism = "the convolution of the values (dwc)"
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


def filter_trunk(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint of ours, or of timm's ViTs, to the model's positions and projections."""
    return fit_projections(dict(vit_filter_fn(state_dict, model)), model)


def fit_projections(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint's sequence projections (Linformer's) to a model's grid of tokens."""
    own = model.state_dict()
    prefix: int = getattr(model, "num_prefix_tokens", 0)
    out = dict(state_dict)
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


def build(
    family: Callable[..., Model],
    variant: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    filter_fn: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = filter_trunk,
    **kwargs: Any,
) -> Model:
    """Build a model through timm.

    Args:
        family: The model's class.
        variant: Name of the entry point.
        pretrained: Load the published weights; under a bare name, those of its best tag.
        defaults: The variant's arguments.
        filter_fn: Fits a checkpoint to the model.
        **kwargs: The caller's arguments, which go over the defaults.

    Returns:
        The model, or timm's feature extractor where ``features_only=True``.
    """
    if pretrained:
        kwargs |= choose_weights(variant, kwargs)
    arguments = {**usual_input(variant, kwargs.get("pretrained_cfg")), **defaults, **kwargs}
    # features_only goes through forward_intermediates ("getter"), which gives NCHW maps.
    out_indices = arguments.pop("out_indices", min(3, arguments.get("depth", 3)))
    model: Model = build_model_with_cfg(
        family,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )
    return model
