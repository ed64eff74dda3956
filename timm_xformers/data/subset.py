"""Parts of a data set: some of its classes, some of its training images."""

import dataclasses
from collections.abc import Sequence

import torch

from timm_xformers.data.rawsplit import RawSplit
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.sources import Source
from timm_xformers.errors import UsageError, UserError, nearest

__all__ = ["limit_images", "select_classes"]


def select_classes(source: Source, wanted: Sequence[str | int]) -> Source:
    """Keep some classes, numbered anew in the order in which they are wanted.

    Args:
        source: Splits and names.
        wanted: Class names, or labels where no class has that name.

    Raises:
        UsageError: A class is unknown or named twice, or there are fewer than two.
        UserError: A class has no training image, or a split has no image at all.
    """
    splits = (source.train, source.val, source.test)
    highest = max(int(split.labels.max()) for split in splits if split is not None)
    labels = _labels(wanted, source.class_names, max(len(source.class_names), highest + 1))
    train, val, test = (None if split is None else _keep(split, labels) for split in splits)
    assert train is not None
    counts = train.labels.bincount(minlength=len(labels)).tolist()
    for item, count in zip(wanted, counts, strict=True):
        if count == 0:
            raise UserError(f"There are no training images of class {item}; drop it from classes.")
    for title, split in (("validation", val), ("test", test)):
        if split is not None and len(split) == 0:
            raise UserError(f"There are no {title} images of these classes; choose others.")
    names = tuple(source.class_names[label] for label in labels) if source.class_names else ()
    return Source(train, val, test, names)


def limit_images(split: RawSplit, limit: int) -> RawSplit:
    """Keep at most ``limit`` images, the same share of every class, whatever the seed.

    Raises:
        UsageError: A class would be left without an image.
    """
    if limit >= len(split):
        return split
    labels = split.labels
    _, chosen = stratified_split(labels, limit / len(split), "limit")
    before, after = (int((part.bincount() > 0).sum()) for part in (labels, labels[chosen]))
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
            some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UsageError(
                f"There is no class {text!r}{nearest(text, names)}; use "
                f"{f'names ({some}) or ' if names else ''}labels from 0 to {count - 1}."
            )
        if label in labels:
            raise UsageError(f"classes names {text!r} twice; drop one.")
        labels.append(label)
    if len(labels) < 2:
        raise UsageError("classes must name two classes or more; add some.")
    return labels


def _keep(split: RawSplit, labels: Sequence[int]) -> RawSplit:
    """The images with these labels, which become 0, 1, ..."""
    number = torch.full((max(*labels, int(split.labels.max())) + 1,), -1)
    number[list(labels)] = torch.arange(len(labels))
    renumbered = number[split.labels]
    chosen = renumbered >= 0
    return dataclasses.replace(split, rows=split.rows[chosen], labels=renumbered[chosen])
