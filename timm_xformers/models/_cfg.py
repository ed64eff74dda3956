"""What the families' default configurations share."""

from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

__all__ = ["small_image_cfg"]


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
