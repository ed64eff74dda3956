"""Parts of a data set: some of its classes, some of its training images."""

import dataclasses
from collections.abc import Sequence

import torch

from timm_xformers.data.classes import match_names
from timm_xformers.data.notes import Note
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.sources import Source
from timm_xformers.data.split import Split
from timm_xformers.data.targets import images_by_class, strata
from timm_xformers.errors import UsageError, UserError, nearest
from timm_xformers.files.text import some

__all__ = ["limit_images", "number_like", "select_classes"]


def select_classes(source: Source, wanted: Sequence[str | int]) -> Source:
    """Keep some classes, numbered anew in the order in which they are wanted.

    They are named, or numbered where no class has that name.

    Raises:
        UsageError: A class is unknown or named twice, or there are fewer than two.
        UserError: A class has no training image, or a split has no image at all.
    """
    splits = (source.train, source.val, source.test)
    highest = max(int(split.labels.max()) for split in source.splits)
    labels = _labels(wanted, source.class_names, max(len(source.class_names), highest + 1))
    train, val, test = (None if split is None else _keep(split, labels) for split in splits)
    counts = [] if train is None else train.labels.bincount(minlength=len(labels)).tolist()
    for item, count in zip(wanted, counts, strict=False):
        if count == 0:
            raise UserError(f"There are no training images of class {item}; drop it from classes.")
    for title, split in (("validation", val), ("test", test)):
        if split is not None and len(split) == 0:
            raise UserError(f"There are no {title} images of these classes; choose others.")
    names = tuple(source.class_names[label] for label in labels) if source.class_names else ()
    return dataclasses.replace(source, train=train, val=val, test=test, class_names=names)


def number_like(
    source: Source,
    vocabularies: Sequence[Sequence[str]],
    num_classes: int | None,
    *,
    skip_unknown: bool,
) -> Source:
    """Number the classes of a source as a model does, by name.

    Args:
        source: Splits and names.
        vocabularies: The model's names by label; the one that knows most of the source's counts.
        num_classes: Classes of the model, for one without names: position decides there.
        skip_unknown: Leave out images of classes that the model does not know.

    Returns:
        The source, with the model's names and a note on what was left out.

    Raises:
        UserError: The model does not know a class that has images, or none at all.
    """
    names = source.class_names
    if not vocabularies:
        if num_classes not in (None, len(names)):
            raise UserError(
                f"The images have {len(names)} classes and the model {num_classes} that nobody "
                "names, so which is which cannot be told; use weights with names, such as a run's "
                "best folder, or images of all its classes."
            )
        return source
    matches = [match_names(names, known) for known in vocabularies]
    numbers, known = max(
        zip(matches, vocabularies, strict=True), key=lambda m: int((m[0] >= 0).sum())
    )
    seen = images_by_class(torch.cat([split.labels for split in source.splits]), len(numbers))
    strange = [
        name
        for name, number, count in zip(names, numbers, seen, strict=False)
        if number < 0 and count
    ]
    if strange and (not skip_unknown or len(strange) == int((seen > 0).sum())):
        raise UserError(
            f"The model does not know {len(strange)} of {int((seen > 0).sum())} classes: "
            f"{some(strange)}; it knows {some(known)}. Rename the classes, or leave such images "
            "out by --skip-unknown-classes."
        )
    train, val, test = (
        None if split is None else split.renumbered(numbers, len(known))
        for split in (source.train, source.val, source.test)
    )
    lost = sum(map(len, source.splits)) - sum(len(s) for s in (train, val, test) if s is not None)
    images, kinds = (
        f"{count} {what}" + ("" if count == 1 else end)
        for count, what, end in ((lost, "image", "s"), (len(strange), "class", "es"))
    )
    left = f"left out: {images} of {kinds} that the model does not know"
    notes = (*source.notes, Note(f"{left} ({some(strange)})", left)) if lost else source.notes
    return Source(train, val, test, tuple(known), notes)


def limit_images(split: Split, limit: int) -> Split:
    """Keep at most ``limit`` images, the same share of every class, whatever the seed.

    With several classes an image, the same share of each of the `targets.strata`.

    Raises:
        UsageError: A class would be left without an image.
    """
    if limit >= len(split):
        return split
    labels = split.labels
    _, chosen = stratified_split(strata(labels), limit / len(split), "limit")
    before, after = (int((images_by_class(part, 0) > 0).sum()) for part in (labels, labels[chosen]))
    if after < before:
        raise UsageError(
            f"limit={limit} leaves images of {after} of {before} classes; raise it, or name fewer "
            "classes."
        )
    return split.subset(chosen)


def _labels(wanted: Sequence[str | int], names: Sequence[str], count: int) -> list[int]:
    """The labels that are meant."""
    labels: list[int] = []
    for item in wanted:
        text = str(item).strip()
        if text in names:
            label = names.index(text)
        elif text.isdecimal() and int(text) < count:
            label = int(text)
        else:
            raise UsageError(
                f"There is no class {text!r}{nearest(text, names)}; use "
                f"{f'names ({some(names, 10)}) or ' if names else ''}labels from 0 to {count - 1}."
            )
        if label in labels:
            raise UsageError(f"classes names {text!r} twice; drop one.")
        labels.append(label)
    if len(labels) < 2:
        raise UsageError("classes must name two classes or more; add some.")
    return labels


def _keep(split: Split, labels: Sequence[int]) -> Split:
    """The images with these labels, which become 0, 1, ..."""
    number = torch.full((max(*labels, int(split.labels.max())) + 1,), -1)
    number[list(labels)] = torch.arange(len(labels))
    return split.renumbered(number, len(labels))
