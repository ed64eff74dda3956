"""The data of a run: train, validation and test splits, what they hold, and their batches."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import Compose, RandomErasing

from timm_xformers.data.augment import Augmentation
from timm_xformers.data.classes import alike_names
from timm_xformers.data.damaged import drop_damaged, find_cut_files, refuse_damaged
from timm_xformers.data.duplicates import shared_pictures
from timm_xformers.data.known_sets import KNOWN_SETS, KnownSet
from timm_xformers.data.loader import LoaderBatches, usable_cores
from timm_xformers.data.memory import MemoryBatches, decode
from timm_xformers.data.notes import Note
from timm_xformers.data.preprocessing import Preprocessing, input_size
from timm_xformers.data.rand_augment import check_policy
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.sources import Source, open_source
from timm_xformers.data.split import Split
from timm_xformers.data.subset import limit_images, number_like, select_classes
from timm_xformers.data.targets import are_marks, are_unlabelled, images_by_class, strata
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.text import some
from timm_xformers.recipe import Recipe

__all__ = ["Batches", "Data", "make_batches", "open_data", "refuse_unread"]

MEMORY_ONLY = ("crop_pad", "rotate_degrees", "shear_degrees", "zoom", "cutout", "rand_augment")
# What is decoded once and kept, unless the recipe says otherwise: all splits together.
HELD_UNASKED_MIB = 1024
LOADER_ONLY = ("min_crop_area", "color_jitter", "auto_augment")
# What to do about a part without labels.
_NO_LABELS = {
    "training": "name a labelled split by --set train_split=NAME",
    "validation": "name another by --set val_split=NAME",
    "test": "test on another split, such as --set test_split=validation, where validation images "
    "are then set aside from training, or do without by --set test_split=none",
}


class Batches(Protocol):
    """One split, ready to be drawn from."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(self, order: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (B, C, H, W) and labels for each tensor of positions.

        Labels are classes (B,), or marks (B, classes); see `targets`.
        """
        ...


@dataclass(frozen=True)
class Data:
    """Splits and what they hold.

    Attributes:
        train: Images that training sees; where only a test set was asked for and there is nothing
            else, that.
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
        notes: Lines on what was found and what of it is in no split.
        undivided: Whether the test set is a whole data set that has no part for training.
    """

    train: Split
    val: Split | None
    test: Split | None
    num_classes: int
    in_chans: int
    class_names: tuple[str, ...]
    img_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool
    skipped: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    undivided: bool = False

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return are_marks(self.train.labels)

    @property
    def unlabelled(self) -> bool:
        """Whether the images have no labels."""
        return are_unlabelled(self.train.labels)

    @property
    def kept_notes(self) -> list[str]:
        """What a record keeps of the notes."""
        return [note.kept for note in self.notes if note.kept]

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

    @property
    def splits(self) -> dict[str, Split]:
        """Those that there are, by name."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            UserError: The data set has none of this name.
        """
        if name not in self.splits:
            raise UserError(f"The data set has no {name} split; it has {', '.join(self.splits)}.")
        return self.splits[name]


def open_data(
    recipe: Recipe,
    used: Collection[str] = ("train", "val", "test"),
    model_classes: Sequence[Sequence[str]] | None = None,
    *,
    skip_unknown: bool = False,
) -> Data:
    """Open the data of a recipe and set a validation part aside.

    The part depends on the data, its classes and ``val_fraction`` alone, so that runs over several
    seeds, or with fewer training images, are chosen by the same images.

    Args:
        recipe: Names the data and which part of it to take.
        used: Splits that will be read. Only these are looked through for unreadable images, and
            only these count towards the size that is held in memory.
        model_classes: Names by label that a trained model has for its classes, in each vocabulary
            that is known; the data's classes are numbered like them. Empty: nobody names the
            model's, so the data must have as many. None: the model is yet to be built.
        skip_unknown: Leave out images of classes that the model does not know.

    Raises:
        UserError: The data is missing, empty, unreadable or does not fit the recipe or the model.
    """
    if recipe.rand_augment is not None:
        check_policy(recipe.rand_augment)
    source = open_source(recipe, used)
    undivided = source.train is None
    if recipe.classes is not None:
        source = select_classes(source, recipe.classes)
    if model_classes is not None and source.class_names:
        needed = {*used} | ({"train"} if "val" in used and source.val is None else set())
        source = source.only(needed)
        source = number_like(source, model_classes, recipe.num_classes, skip_unknown=skip_unknown)
    num_classes = _count_classes(recipe, source)
    splits = _set_validation_aside(recipe, source)
    known = KNOWN_SETS.get(recipe.data)
    chosen = {name: split for name in used if (split := splits[name]) is not None}
    images = next(iter(chosen.values()), source.splits[0])
    in_chans = 1 if images.mode == "L" else 3
    in_memory = recipe.in_memory
    if in_memory is None:
        side = input_size(recipe.img_size, known.img_size if known else None, model=recipe.model)
        channels = sum(map(len, chosen.values())) * in_chans  # of uint8 images, over all splits
        in_memory = side is not None and channels * side**2 <= HELD_UNASKED_MIB * 2**20
    refuse_unread(recipe, in_memory)
    readable, skipped = _without_damaged(recipe, chosen)
    splits |= readable
    _refuse_unmarked(readable)
    doubled = [] if known else shared_pictures(readable)  # those of known sets are known
    lacking = _lacking(readable.get("test"), source.class_names, num_classes)
    mean, std = _scale(known, in_chans)
    train = splits["train"] or images
    return Data(
        train=train,
        val=splits["val"],
        test=splits["test"],
        num_classes=num_classes,
        in_chans=in_chans,
        class_names=source.class_names if len(source.class_names) == num_classes else (),
        img_size=known.img_size if known else None,
        mean=mean,
        std=std,
        in_memory=in_memory,
        skipped=tuple(skipped),
        notes=(*source.notes, *alike_names(source.class_names), *doubled, *lacking),
        undivided=undivided,
    )


def _count_classes(recipe: Recipe, source: Source) -> int:
    """Width of a classifier, once all labels are seen to fit.

    A label without a name, or above ones that no image has, is a slip more often than a class.
    """
    if recipe.unlabelled:
        return recipe.num_classes or 0  # as many as the model has
    titled = {"training": source.train, "validation": source.val, "test": source.test}
    if recipe.multi_label:
        return _count_marked(recipe, source)
    for title, split in titled.items():
        if split is not None and bool((split.labels < 0).all()):
            raise UserError(
                f"The {title} images have no labels ({int(split.labels[0])} each), as sets do that "
                f"hide them; {_NO_LABELS[title]}."
            )
    lowest = min(int(split.labels.min()) for split in source.splits)
    highest = max(int(split.labels.max()) for split in source.splits)
    count = recipe.num_classes or len(source.class_names) or highest + 1
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"Label {wrong} is out of range: {count} classes have labels 0 to {count - 1}; correct "
            "the labels or num_classes."
        )
    if not source.class_names and recipe.num_classes is None:
        seen = torch.cat([split.labels for split in source.splits]).bincount()
        if absent := (seen == 0).nonzero().flatten().tolist():
            raise UserError(
                f"Label {highest} is the highest, and no image has label {some(absent)}; correct "
                f"the labels, or say --set num_classes={count} if these classes are to be kept."
            )
    if count < 2:
        raise UserError(
            "The images form one class, and training needs two; put each class into a folder of "
            "its own."
        )
    return count


def _count_marked(recipe: Recipe, source: Source) -> int:
    """The same for marks, which have a name each."""
    count = len(source.class_names)
    if recipe.num_classes not in (None, count):
        raise UserError(
            f"num_classes={recipe.num_classes} was asked for, and {recipe.labels} has {count} "
            "classes; drop num_classes, or add columns to the file."
        )
    if count < 2:
        raise UserError(
            f"{recipe.labels} has one class, and multi_label is for several; write its presence "
            "and absence as two classes, without multi_label."
        )
    return count


def _refuse_unmarked(splits: Mapping[str, Split]) -> None:
    """Precision has no meaning where no image has a class."""
    for name, split in splits.items():
        if are_marks(split.labels) and not split.labels.any():
            raise UserError(
                f"Not one of {len(split)} {name} images has a class; add images that have, or "
                "raise val_fraction where these come from training."
            )


def _lacking(test: Split | None, names: Sequence[str], num_classes: int) -> list[Note]:
    """A line on classes without test images, on which the figures say nothing; or none."""
    if test is None:
        return []
    if are_unlabelled(test.labels):
        return []
    seen = images_by_class(test.labels, num_classes)
    named = len(names) == num_classes
    absent = [names[n] if named else str(n) for n in (seen == 0).nonzero().flatten().tolist()]
    if not absent:
        return []
    words = f"no test images of {len(absent)} of {num_classes} classes"
    return [Note(f"{words} ({some(absent)})", words)]


def _set_validation_aside(recipe: Recipe, source: Source) -> dict[str, Split | None]:
    """The splits by name, with validation images from training where the data has none."""
    train, val = source.train, source.val
    if train is not None:
        if val is None and recipe.val_fraction:
            keep, held = stratified_split(strata(train.labels), recipe.val_fraction, "val")
            if len(held) == 0:
                raise UserError(
                    f"val_fraction={recipe.val_fraction} of {len(train)} training images is none; "
                    "raise it, or use 0 to do without validation."
                )
            train, val = train.subset(keep), train.subset(held)
        if recipe.limit is not None:
            train = limit_images(train, recipe.limit)
    return {"train": train, "val": val, "test": source.test}


def _without_damaged(
    recipe: Recipe, splits: Mapping[str, Split]
) -> tuple[dict[str, Split], list[str]]:
    """What can be read of splits, and the names of the rest; the recipe may refuse such a rest."""
    if recipe.unreadable == "error":
        problems = [problem for split in splits.values() for problem in find_cut_files(split)]
        refuse_damaged(problems, sum(map(len, splits.values())))
        return dict(splits), []
    kept: dict[str, Split] = {}
    skipped: list[str] = []
    for name, split in splits.items():
        kept[name], lost = drop_damaged(split, _decoders(recipe))
        skipped += lost
    return kept, skipped


def _scale(known: KnownSet | None, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels: the set's own, else ImageNet's or a half."""
    if known is not None and known.in_chans == in_chans:
        return known.mean, known.std
    if in_chans == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.5,), (0.5,)


def _decoders(recipe: Recipe) -> int:
    """Decoding processes; more than there are cores only get in each other's way."""
    return min(recipe.num_workers, usable_cores())


def make_batches(
    split: Split,
    recipe: Recipe,
    preprocessing: Preprocessing,
    *,
    in_memory: bool,
    training: bool,
    device: torch.device,
) -> Batches:
    """Decode a split, or prepare to, for training (augmented) or evaluation."""
    if in_memory:
        strengths = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Augmentation)}
        return MemoryBatches(
            decode(split, preprocessing, _decoders(recipe)),
            split.labels,
            mean=preprocessing.mean,
            std=preprocessing.std,
            device=device,
            augmentation=Augmentation(**strengths) if training else None,
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
