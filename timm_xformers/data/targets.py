"""What an image's label is: its class, (N,), or with several classes an image, marks (N, C).

Marks are floats of 0 and 1, as binary cross-entropy takes them. Images without labels have the
number `UNLABELLED` in the place of a class. What differs between the kinds, from files to splits,
is here.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    *("UNLABELLED", "Classes", "are_marks", "are_unlabelled", "images_by_class", "names_in"),
    *("renumber", "strata", "to_labels"),
]

UNLABELLED = -1

# By name: the class of an image, or its classes, of which there may be none.
Classes = str | tuple[str, ...]


def are_marks(labels: Tensor) -> bool:
    """Whether labels are marks, (N, C)."""
    return labels.dim() == 2


def are_unlabelled(labels: Tensor) -> bool:
    """Whether no image has a label."""
    return not are_marks(labels) and bool((labels == UNLABELLED).all())


def names_in(found: Iterable[Classes]) -> set[str]:
    """All names that occur."""
    return {name for each in found for name in ((each,) if isinstance(each, str) else each)}


def to_labels(found: Collection[Classes], order: Sequence[str]) -> Tensor:
    """Labels (N,) of names, or marks (N, C) of tuples of names, numbered in an order.

    Without an order nobody knows a class, and all are `UNLABELLED`.
    """
    if not order:
        return torch.full((len(found),), UNLABELLED)
    number = {name: label for label, name in enumerate(order)}
    if all(isinstance(each, str) for each in found):
        return torch.tensor([number[str(each)] for each in found], dtype=torch.long)
    marks = torch.zeros(len(found), len(order))
    for row, names in enumerate(found):
        marks[row, [number[name] for name in names]] = 1
    return marks


def images_by_class(labels: Tensor, num_classes: int) -> Tensor:
    """Images that have each class, (C,)."""
    if are_unlabelled(labels):
        return torch.zeros(num_classes, dtype=torch.long)
    return labels.long().sum(0) if are_marks(labels) else labels.bincount(minlength=num_classes)


def strata(labels: Tensor) -> Tensor:
    """Groups from which the same share is drawn, (N,): classes; of marks, the rarest of each image.

    The rarest is by all images given here, the first among equals; images without a class are a
    group of their own. So a rare class is divided as evenly as in data of one class an image, and a
    common one nearly so.
    """
    if not are_marks(labels):
        return labels
    num_classes = labels.shape[1]
    # An image's own classes by their counts, all others beyond them.
    counts = torch.where(labels > 0, labels.long().sum(0), len(labels) + 1)  # (N, C)
    rarest = (counts * num_classes + torch.arange(num_classes)).argmin(dim=1)
    return torch.where(labels.any(dim=1), rarest, num_classes)


def renumber(labels: Tensor, numbers: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels by other numbers.

    Args:
        labels: Classes (N,) or marks (N, C).
        numbers: New number by old one, (C,); negative ones have none.
        num_classes: Width of new marks.

    Returns:
        The labels, and which images have no class without a number, (N,).
    """
    if not are_marks(labels):
        return numbers[labels], numbers[labels] >= 0
    known = numbers >= 0
    marks = labels.new_zeros(len(labels), num_classes)
    marks[:, numbers[known]] = labels[:, known]
    return marks, ~labels[:, ~known].any(dim=1)
