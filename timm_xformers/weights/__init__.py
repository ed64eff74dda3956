"""Trained weights that come with the package, and timm's configurations of them.

A tag is a data set: ``vix_performer_softmax_m32.digits``. `manifest.json` describes every tag; its
weights lie beside it as float16 safetensors and are read when a model is created, not before.
``python -m tools.add_weights RUN``, in a clone, adds one.
"""

from timm_xformers.weights.images import check_images
from timm_xformers.weights.manifest import (
    MANIFEST_FILE,
    MAX_BYTES,
    TAGS,
    Weights,
    best_tag,
    read_manifest,
    with_weights,
)

__all__ = [
    "MANIFEST_FILE",
    "MAX_BYTES",
    "TAGS",
    "Weights",
    "best_tag",
    "check_images",
    "read_manifest",
    "with_weights",
]
