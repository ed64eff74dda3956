"""Retrofit: any architecture of timm with other attention in some of its blocks.

``timm.create_model("retrofit", architecture="vit_tiny_patch16_224", replacement={...})`` builds
the architecture and replaces (`timm_xformers.replace_attention`). A model whose attention was
replaced says so in what timm's ``save_for_hf`` writes, so the folder loads by ``local-dir:`` and
``hf-hub:`` like any other.
"""

import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from timm_xformers.models._cfg import SOURCES, default_configs
from timm_xformers.models._register import register_model
from timm_xformers.models._trunk import filter_trunk, fit_projections
from timm_xformers.replace.replacing import put_in
from timm_xformers.replace.sites import attention_sites

# What a model is when nobody says more; all that counts comes from the architecture.
default_cfgs = default_configs({"retrofit": {"input_size": (3, 224, 224), "num_classes": 1000}})


@register_model
def retrofit(
    pretrained: bool = False,
    *,
    architecture: str | None = None,
    replacement: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """An architecture with replaced attention.

    Args:
        pretrained: Load weights: those of ``pretrained_cfg``, or the architecture's own where that
            names none; a mechanism's own parameters then start anew.
        architecture: Name of a model of timm, its tag where one is wanted.
        replacement: Arguments of `timm_xformers.replace_attention`, as its report's ``record``.
        **kwargs: Arguments of the architecture.

    Raises:
        ValueError: ``architecture`` or ``replacement`` is missing, or what `replace_attention`
            refuses.
    """
    if architecture is None or replacement is None:
        raise ValueError(
            'retrofit is another model with replaced attention, so it needs architecture="..." and '
            'replacement={"mechanism": "..."}; the config.json of a saved one holds both, but that '
            "timm before 1.0.31 writes them only if save_for_hf is given them as model_args."
        )
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    config: Any = kwargs.pop("pretrained_cfg", None)
    sources = dict(overlay)
    if config is None or isinstance(config, str):  # the architecture's, by its tag
        config = get_pretrained_cfg(architecture if config is None else f"{architecture}.{config}")
    elif config:
        sources |= config if isinstance(config, Mapping) else config.to_dict()
    if config is None:
        raise ValueError(f"architecture={architecture!r} is no model of timm.")
    config = dict(config) if isinstance(config, Mapping) else config.to_dict()
    # The architecture loads its own weights by its own code. Others are of the model as a whole,
    # or of the architecture, which the layers take too.
    whole = any(sources.get(source) for source in SOURCES)
    cache_dir = kwargs.pop("cache_dir", None)
    # As timm's ViTs: the features of the last three blocks, by forward_intermediates.
    features: dict[str, Any] = {"feature_cls": "getter", "out_indices": 3}

    def build(**arguments: Any) -> nn.Module:
        model = timm.create_model(
            architecture, pretrained=pretrained and not whole, cache_dir=cache_dir, **arguments
        )
        put_in(model, **replacement)
        if "out_indices" not in kwargs:
            features["out_indices"] = min(3, len(attention_sites(model)))
        return model

    model: nn.Module = build_model_with_cfg(
        build,
        "retrofit",
        pretrained and whole,
        pretrained_cfg={**config, "architecture": "retrofit"},
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_filter(architecture),
        cache_dir=cache_dir,
        feature_cfg=features,
        **kwargs,
    )
    return model


def _filter(architecture: str) -> Any:
    """What fits a checkpoint to the model: the architecture's filter, and projections."""
    module = sys.modules[model_entrypoint(architecture.partition(".")[0]).__module__]
    own = getattr(module, "checkpoint_filter_fn", None)
    if module.__name__.startswith("timm_xformers."):
        own = own or filter_trunk

    def fit(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        return fit_projections(state_dict if own is None else own(state_dict, model), model)

    return fit
