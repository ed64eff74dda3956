"""What a comparison of speed with timm's train.py runs: the same work, as settings of either side.

Every case uses 32-pixel colour images from one folder, AdamW, label smoothing, float32 and the
default memory layout. Whether the transforms are the same is said in each case's words.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BATCH_SIZE", "CASES", "EPOCHS", "IMG_SIZE", "Case", "our_settings", "timm_settings"]

# The first epoch starts workers and allocates; the others are measured.
EPOCHS = 3
BATCH_SIZE = 128
IMG_SIZE = 32
SMOOTHING = 0.1

# What train.py does unless told otherwise: its crop area, flip and jitter in our words. It draws
# bilinear or bicubic for each image, and we have one; both are told bicubic.
TIMM_DEFAULT = {"train_interpolation": "bicubic"}
OURS_LIKE_TIMM = {"in_memory": False, "min_crop_area": 0.08, "hflip": 0.5, "color_jitter": 0.4}
FLIP_AND_SHIFT = {"in_memory": True, "hflip": 0.5, "crop_pad": 4}
# Crops of the whole image need no resampling, and null (not 0) leaves the jitter out altogether.
TIMM_FLIP = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "color_jitter": None}


@dataclass(frozen=True)
class Case:
    """One model and one pair of input pipelines.

    Attributes:
        words: What either side computes.
        model: Name for timm.create_model.
        steps: Batches of an epoch.
        ours: Recipe keys.
        timm: Keys of train.py's configuration.
        model_kwargs: Further arguments of the model.
    """

    words: str
    model: str
    steps: int
    ours: dict[str, Any]
    timm: dict[str, Any]
    model_kwargs: dict[str, Any] = field(default_factory=dict)


CASES = {
    "compute": Case(
        "A compact transformer; both decode PNG files in worker processes and apply the same "
        "transforms of timm (resized crop of 8 to 100 % of the area, flip, colour jitter 0.4).",
        "ccn_2_3x2_32",
        30,
        OURS_LIKE_TIMM,
        TIMM_DEFAULT,
    ),
    "medium": Case(
        "A deeper vision transformer on 64 patches; files and transforms as in `compute`.",
        "vix_nystrom",
        30,
        OURS_LIKE_TIMM,
        TIMM_DEFAULT,
        {"patch_size": 4},
    ),
    "loader": Case(
        "A model of some 3,000 parameters on 16 patches; files and transforms as in `compute`, so "
        "that the two loaders are compared.",
        "vix_mnist_nano",
        60,
        OURS_LIKE_TIMM,
        TIMM_DEFAULT,
        {"patch_size": 8},
    ),
    "memory": Case(
        "The model of `loader`. Not the same work: ours decodes once before the first epoch, then "
        "flips and shifts by up to 4 pixels in batches, in the training process; timm decodes "
        "every image in every epoch and applies its default transforms, as in `compute`.",
        "vix_mnist_nano",
        60,
        FLIP_AND_SHIFT,
        TIMM_DEFAULT,
        {"patch_size": 8},
    ),
    "memory_equal": Case(
        "The model of `loader`, with transforms as equal as the options allow: ours as in "
        "`memory`; timm decodes in every epoch and flips, without crop, resampling and jitter. It "
        "has no shift by whole pixels, so that its transforms do a little less than ours.",
        "vix_mnist_nano",
        60,
        FLIP_AND_SHIFT,
        TIMM_FLIP,
        {"patch_size": 8},
    ),
}


def our_settings(
    case: Case, images: Path, output: Path, *, workers: int, seed: int
) -> dict[str, Any]:
    """The recipe of our side.

    Args:
        case: What to run.
        images: Folder with ``train/CLASS/*.png`` and nothing else.
        output: Run folder.
        workers: Decoding processes.
        seed: Of the run.
    """
    return {
        "model": case.model,
        "model_kwargs": case.model_kwargs,
        "data": "folder",
        "data_dir": str(images),
        "val_fraction": 0.0,
        "img_size": IMG_SIZE,
        "in_chans": 3,
        "normalize": "model",
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "opt": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 0.0,
        "smoothing": SMOOTHING,
        "num_workers": workers,
        "seed": seed,
        "trackers": [],
        "output": str(output),
        **case.ours,
    }


def timm_settings(
    case: Case, images: Path, output: Path, *, workers: int, seed: int, prefetcher: bool
) -> dict[str, Any]:
    """The configuration of train.py, for its ``--config``; arguments as for `our_settings`.

    Args:
        case: What to run.
        images: The same folder.
        output: Where train.py may write.
        workers: Decoding processes.
        seed: Of the run.
        prefetcher: Normalise in the training process, as train.py does by default, or in the
            workers. Which is faster on a CPU depends on the machine.
    """
    return {
        "model": case.model,
        "model_kwargs": {"img_size": IMG_SIZE, **case.model_kwargs},
        "device_modules": ["timm_xformers"],  # imported before the model is looked up
        "data_dir": str(images),
        "val_split": "",  # none: nothing is validated
        "val_interval": EPOCHS,  # one checkpoint, after the last epoch
        "img_size": IMG_SIZE,
        "in_chans": 3,
        "num_classes": sum(path.is_dir() for path in (images / "train").iterdir()),
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "opt": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 0,
        "smoothing": SMOOTHING,
        "device": "cpu",
        "no_prefetcher": not prefetcher,
        "workers": workers,
        "seed": seed,
        "log_interval": 10**6,  # the first and the last batch of an epoch are always logged
        "output": str(output),
        "experiment": "timm",
        **case.timm,
    }
