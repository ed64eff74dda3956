"""Images with their labels, whatever kind of data set keeps them."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from timm_xformers.data.classes import ONE_CLASS_EACH
from timm_xformers.data.pixels import as_mode, decode_picture
from timm_xformers.data.targets import are_marks, renumber
from timm_xformers.errors import UserError
from timm_xformers.files.text import one_line, plain

__all__ = ["Images", "PilImages", "Split", "label_tensor", "split_of"]


class Images:
    """Images by row, each kind of data set in its own way.

    Attributes:
        encoded: Whether `open` gives a file's bytes, which may be damaged, and no pixels.
        labels: Class of each image (N,), or marks (N, C); see `targets`.
        class_names: By label; empty if nobody names them.
    """

    encoded: ClassVar[bool] = True
    labels: Tensor
    class_names: tuple[str, ...]

    def open(self, row: int) -> BinaryIO | Image.Image:
        """The image: its bytes, or its pixels where they are at hand."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """What to call it in a message: its file, where it has one."""
        return f"number {row}"

    def path(self, row: int) -> Path | None:
        """Its file, if that is a plain one."""
        return None

    def key(self, row: int) -> str:
        """What tells it from the others, wherever the data set lies."""
        return str(row)


class PilImages(Images):
    """Images held in memory, by label and in order.

    Args:
        images: Pictures.
        labels: Class of each.
        class_names: By label; empty if the classes have none.
    """

    encoded: ClassVar[bool] = False

    def __init__(
        self,
        images: Sequence[Image.Image],
        labels: Iterable[Any],
        class_names: Iterable[str] = (),
    ) -> None:
        self.images = images
        self.labels = label_tensor(labels)
        self.class_names = tuple(class_names)

    def open(self, row: int) -> Image.Image:
        """The picture."""
        return self.images[row]


@dataclasses.dataclass(frozen=True)
class Split:
    """Some images of a data set.

    Attributes:
        images: Where they are.
        rows: The images that belong to the split (N,).
        labels: Class of each (N,), or marks (N, C); see `targets`.
        mode: PIL mode of the pictures handed out: L or RGB.
    """

    images: Images
    rows: Tensor
    labels: Tensor
    mode: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoded(self) -> bool:
        """Whether images are files' bytes, which may be damaged, and no pixels."""
        return self.images.encoded

    def image(self, position: int) -> Image.Image:
        """Decode one image.

        Raises:
            UserError: The file cannot be decoded; its name is in the message.
        """
        try:
            found = self.images.open(int(self.rows[position]))
            if isinstance(found, Image.Image):
                return as_mode(found, self.mode)
            with found:
                return decode_picture(found, self.mode)
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise UserError(
                f"Cannot read image {self.name(position)}: {_reason(error)}; repair it, or "
                "leave it out of a new run with --set unreadable=skip."
            ) from error

    def content(self, position: int) -> bytes:
        """The file's bytes of an encoded image."""
        found: Any = self.images.open(int(self.rows[position]))
        with found:
            return bytes(found.read())

    def problem(self, position: int) -> str | None:
        """Why an image cannot be decoded; None if it can."""
        try:
            self.image(position)
        except UserError as error:
            return _reason(error.__cause__ or error)
        return None

    def name(self, position: int) -> str:
        """What to call an image in a message: its file, where it has one."""
        return plain(self.images.name(int(self.rows[position])))

    def path(self, position: int) -> Path | None:
        """The file of an image, if that is a plain one."""
        return self.images.path(int(self.rows[position]))

    def subset(self, positions: Tensor) -> "Split":
        """The images at some positions."""
        return dataclasses.replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def renumbered(self, numbers: Tensor, num_classes: int) -> "Split":
        """The split with other labels, as `targets.renumber` has them.

        Args:
            numbers: New label by old one; negative ones leave the images out.
            num_classes: Classes by the new numbers.
        """
        labels, chosen = renumber(self.labels, numbers, num_classes)
        return dataclasses.replace(self, rows=self.rows[chosen], labels=labels[chosen])

    def digest(self) -> str:
        """Hash of the images' names and labels, in order: equal where nothing came or went.

        Pixels are not read, and where the data set lies does not matter.
        """
        found, marked = hashlib.sha256(), are_marks(self.labels)
        for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True):
            key = self.images.key(row).encode("utf-8", "surrogateescape")
            text = "".join("01"[int(mark)] for mark in label) if marked else str(label)
            found.update(b"%s %d %s\n" % (text.encode(), len(key), key))
        return found.hexdigest()[:16]


def split_of(images: Images, mode: str) -> Split:
    """All of a data set's images, to be handed out in a PIL mode.

    Raises:
        UserError: There are none.
    """
    if len(images.labels) == 0:
        raise UserError("The data set has no images; check --data-dir and the names of its splits.")
    return Split(images, torch.arange(len(images.labels)), images.labels, mode)


def label_tensor(values: Iterable[Any]) -> Tensor:
    """Labels as a tensor (N,).

    Raises:
        UserError: They are no whole numbers.
    """
    found = np.asarray(values) if isinstance(values, Tensor) else values
    found = found if isinstance(found, np.ndarray) else list(found)
    for value in found:
        if isinstance(value, (list, tuple, dict, np.ndarray, Tensor)):
            raise UserError(f"A label here is {str(value)[:60]}: {ONE_CLASS_EACH}.")
        if not isinstance(value, (int, np.integer)):
            raise UserError(
                f"Labels must be whole numbers, and the first here is {value!r}; store classes as "
                "numbers (ClassLabel)."
            )
    return torch.as_tensor(np.asarray(found, dtype=np.int64))


def _reason(error: BaseException) -> str:
    """One line on a decoder's error, without the object it was reading from."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown kind"
    return one_line(error)
