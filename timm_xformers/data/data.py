"""The data of a run: train, validation and test splits, what they hold, and their batches."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.models import get_pretrained_cfg
from torch import Tensor
from torchvision.transforms import Compose, RandomErasing

from timm_xformers.data.augment import Augmentation
from timm_xformers.data.known_sets import KNOWN_SETS, KnownSet
from timm_xformers.data.loader import LoaderBatches, usable_cores
from timm_xformers.data.memory import MemoryBatches, decode
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.data.rand_augment import check_policy
from timm_xformers.data.rawsplit import RawSplit
from timm_xformers.data.readable import drop_unreadable, glance, refuse_unreadable
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.sources import open_source
from timm_xformers.data.subset import limit_images, select_classes
from timm_xformers.errors import UsageError, UserError
from timm_xformers.recipe import Recipe

__all__ = ["Batches", "Data", "make_batches", "open_data", "refuse_unread"]

MEMORY_ONLY = ("crop_pad", "rotate_degrees", "shear_degrees", "zoom", "cutout", "rand_augment")
# What is decoded once and kept, unless the recipe says otherwise: all splits together.
HELD_UNASKED_MIB = 1024
LOADER_ONLY = ("min_crop_area", "color_jitter", "auto_augment")


class Batches(Protocol):
    """One split, ready to be drawn from."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(self, order: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, C, H, W) and labels (B,) for each tensor of positions."""
        ...


@dataclass(frozen=True)
class Data:
    """Splits and what they hold.

    Attributes:
        train: Images that training sees.
        val: Images that choose the best epoch; None if there are none.
        test: Images read once, at the end; None if there are none.
        num_classes: Width of a classifier for them.
        in_chans: Colour channels.
        class_names: By label; empty if the source does not name them.
        img_size: Side of the images in pixels, where it is known and one.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        in_memory: Whether batches are made from decoded images.
        skipped: Names of unreadable images, which are in none of the splits.
    """

    train: RawSplit
    val: RawSplit | None
    test: RawSplit | None
    num_classes: int
    in_chans: int
    class_names: tuple[str, ...]
    img_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool
    skipped: tuple[str, ...] = ()

    def preprocess(self, preprocessing: Preprocessing, normalize: str) -> Preprocessing:
        """A new model's size and channels for this data, images kept whole.

        Args:
            preprocessing: What the model's configuration says.
            normalize: Whose mean and std to scale by: ``data`` or ``model``.
        """
        whole = dataclasses.replace(preprocessing, crop_pct=1.0, interpolation="bicubic")
        if normalize == "model":
            return whole
        return dataclasses.replace(whole, mean=self.mean, std=self.std)

    def split(self, name: str) -> RawSplit:
        """A split by name.

        Raises:
            UserError: The data set has none of this name.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        found = splits[name]
        if found is None:
            present = ", ".join(key for key, value in splits.items() if value is not None)
            raise UserError(f"The data set has no {name} split; it has {present}.")
        return found


def open_data(recipe: Recipe, used: Collection[str] = ("train", "val", "test")) -> Data:
    """Open the data of a recipe and set a validation part aside.

    The part depends on the data, its classes and ``val_fraction`` alone, so that runs over several
    seeds, or with fewer training images, are chosen by the same images.

    Args:
        recipe: Names the data and which part of it to take.
        used: Splits that will be read. Only these are looked through for unreadable images, and
            only these count towards the size that is held in memory.

    Raises:
        UserError: The data is missing, empty, unreadable or does not fit the recipe.
    """
    if recipe.rand_augment is not None:
        check_policy(recipe.rand_augment)
    if recipe.test_split == "none":
        source = open_source(dataclasses.replace(recipe, test_split=None))
        source = dataclasses.replace(source, test=None)
    else:
        source = open_source(recipe)
    if recipe.classes is not None:
        source = select_classes(source, recipe.classes)
    known = KNOWN_SETS.get(recipe.data)

    train, val = source.train, source.val
    if val is None and recipe.val_fraction:
        keep, held = stratified_split(train.labels, recipe.val_fraction, "val")
        if len(held) == 0:
            raise UserError(
                f"val_fraction={recipe.val_fraction} of {len(train)} training images is none; "
                "raise it, or use 0 to do without validation."
            )
        train, val = train.subset(keep), train.subset(held)

    splits = [split for split in (source.train, source.val, source.test) if split is not None]
    lowest = min(int(split.labels.min()) for split in splits)
    highest = max(int(split.labels.max()) for split in splits)
    num_classes = recipe.num_classes or max(len(source.class_names), highest + 1)
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"Label {wrong} is out of range: {num_classes} classes have labels 0 to "
            f"{num_classes - 1}; correct the labels or num_classes."
        )
    if num_classes < 2:
        raise UserError(
            "The images form one class, and training needs two; put each class into a folder of "
            "its own."
        )

    if recipe.limit is not None:
        train = limit_images(train, recipe.limit)

    in_chans = 1 if train.mode == "L" else 3
    found = {"train": train, "val": val, "test": source.test}
    chosen = {name: split for name in used if (split := found[name]) is not None}
    in_memory = recipe.in_memory
    if in_memory is None:
        images = sum(map(len, chosen.values()))
        in_memory = _is_small(images * in_chans, _side(recipe, known))
    refuse_unread(recipe, in_memory)
    skipped: list[str] = []
    if recipe.unreadable == "error":
        problems = [problem for split in chosen.values() for problem in glance(split)]
        refuse_unreadable(problems, sum(map(len, chosen.values())))
    else:
        for name, split in chosen.items():
            found[name], lost = drop_unreadable(split, _decoders(recipe))
            skipped += lost

    if known is not None and known.in_chans == in_chans:
        mean, std = known.mean, known.std
    elif in_chans == 3:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    else:
        mean, std = (0.5,), (0.5,)
    readable_train = found["train"]
    assert readable_train is not None
    return Data(
        train=readable_train,
        val=found["val"],
        test=found["test"],
        num_classes=num_classes,
        in_chans=in_chans,
        class_names=source.class_names if len(source.class_names) == num_classes else (),
        img_size=known.img_size if known else None,
        mean=mean,
        std=std,
        in_memory=in_memory,
        skipped=tuple(skipped),
    )


def _decoders(recipe: Recipe) -> int:
    """Decoding processes; more than there are cores only get in each other's way."""
    return min(recipe.num_workers, usable_cores())


def make_batches(
    split: RawSplit,
    recipe: Recipe,
    preprocessing: Preprocessing,
    *,
    in_memory: bool,
    training: bool,
    device: torch.device,
) -> Batches:
    """Decode a split, or prepare to, for training (augmented) or evaluation."""
    if in_memory:
        strengths = Augmentation(
            hflip=recipe.hflip,
            crop_pad=recipe.crop_pad,
            rotate_degrees=recipe.rotate_degrees,
            shear_degrees=recipe.shear_degrees,
            zoom=recipe.zoom,
            re_prob=recipe.re_prob,
            cutout=recipe.cutout,
            rand_augment=recipe.rand_augment,
        )
        return MemoryBatches(
            decode(split, preprocessing, _decoders(recipe)),
            split.labels,
            mean=preprocessing.mean,
            std=preprocessing.std,
            device=device,
            augmentation=strengths if training else None,
            seed=recipe.seed,
        )
    transform = preprocessing.transform()
    if training:
        jitter: Any = recipe.color_jitter or None  # None is off, and timm's type forgets it
        transform = create_transform(
            preprocessing.shape,
            is_training=True,
            scale=(recipe.min_crop_area, 1.0),
            hflip=recipe.hflip,
            color_jitter=jitter,
            auto_augment=recipe.auto_augment,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            normalize=False,
        )
        if recipe.re_prob:  # timm's own erasing is for normalised images, and these are not yet
            mean = [255 * value for value in preprocessing.mean]
            transform = Compose([transform, RandomErasing(recipe.re_prob, value=mean)])
    return LoaderBatches(
        split,
        transform,
        mean=preprocessing.mean,
        std=preprocessing.std,
        device=device,
        num_workers=_decoders(recipe),
        seed=recipe.seed,
    )


def _side(recipe: Recipe, known: KnownSet | None) -> int | None:
    """Side of the model's input in pixels, as far as it can be told without building the model."""
    if recipe.img_size is not None or known is not None:
        return recipe.img_size or (known.img_size if known else None)
    config = get_pretrained_cfg(recipe.model)
    return None if config is None else int(config.input_size[1])


def _is_small(channels: int, side: int | None) -> bool:
    """Whether so many channels of uint8 images, over all splits, may be held in memory unasked."""
    return side is not None and channels * side**2 <= HELD_UNASKED_MIB * 2**20


def refuse_unread(recipe: Recipe, in_memory: bool) -> None:
    """A setting that the chosen path would ignore is a mistake worth a word.

    Raises:
        UsageError: It names the setting.
    """
    defaults = Recipe()
    for name in LOADER_ONLY if in_memory else MEMORY_ONLY:
        if getattr(recipe, name) != getattr(defaults, name):
            raise UsageError(
                f"{name} works only {'from files' if in_memory else 'in memory'}; drop it, or use "
                f"--set in_memory={'false' if in_memory else 'true'}."
            )
