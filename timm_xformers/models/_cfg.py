"""What the families' default configurations share, and which weights a bare name means."""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, get_pretrained_cfg

from timm_xformers.weights import best_tag, with_weights

__all__ = ["PAPER_GEOMETRY", "choose_weights", "default_configs", "small_image_cfg", "usual_input"]

# What the 1,024-token models of Vision Xformers (arXiv:2107.02239) have in common.
PAPER_GEOMETRY: dict[str, Any] = {
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "qkv_bias": False,
    # timm's name for Xavier: at this width its usual 0.02 is a fifth of that, and training starts
    # slowly.
    "weight_init": "moco",
}
SOURCES = ("state_dict", "file", "hf_hub_id", "url")


def small_image_cfg(**kwargs: Any) -> dict[str, Any]:
    """Configuration of a model for 32x32 colour images in ten classes, scaled to [-1, 1].

    Args:
        **kwargs: Fields of timm's `PretrainedCfg` that differ, or are needed beside these.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


def default_configs(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A family's ``default_cfgs`` for timm: these by name, and one more for every packaged tag."""
    tagged: dict[str, Any] = with_weights(configs)
    return dict(generate_default_cfgs(tagged))


def choose_weights(variant: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The tag to load where the caller named neither a tag nor a source of weights.

    Args:
        variant: Name of the model.
        arguments: Those of its entry point.

    Returns:
        Arguments that go over these; nothing if they say what to load, or there is nothing.
    """
    given = arguments.get("pretrained_cfg") or get_pretrained_cfg(variant)
    if given is None or isinstance(given, str):  # a tag
        return {}
    config = given if isinstance(given, dict) else given.to_dict()
    overlay = arguments.get("pretrained_cfg_overlay") or {}
    if any(place.get(source) for place in (config, overlay) for source in SOURCES):
        return {}
    tag = best_tag(variant)
    return {} if tag is None else {"pretrained_cfg": tag}


def usual_input(variant: str, config: Any) -> dict[str, Any]:
    """Size and channels of a model's images, where timm does not take them from a configuration.

    Args:
        variant: Name of the model.
        config: The ``pretrained_cfg`` argument: a tag, a configuration, or None.
    """
    if isinstance(config, str) or not config:
        return {}
    given = config if isinstance(config, dict) else vars(config)
    if given.get("fixed_input_size"):
        return {}
    channels, side, _ = get_pretrained_cfg(variant).input_size  # type: ignore[union-attr]
    return {"img_size": side} | ({} if "input_size" in given else {"in_chans": channels})
