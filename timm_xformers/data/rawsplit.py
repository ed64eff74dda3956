"""Undecoded images with their labels, whatever kind of data set keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_xformers.data.pixels import as_mode, decode_picture
from timm_xformers.errors import UserError

__all__ = ["PilImages", "RawSplit", "class_index", "class_names", "raw_split"]


@dataclass(frozen=True)
class RawSplit:
    """Undecoded images with their labels.

    Attributes:
        dataset: Map-style; items begin with (PIL image, label), unless timm's ImageDataset.
        rows: The items that belong to the split (N,).
        labels: Class of each (N,).
        mode: PIL mode of the images handed out: L or RGB.
    """

    dataset: Any
    rows: Tensor
    labels: Tensor
    mode: str

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, position: int) -> Image.Image:
        """Decode one image.

        Raises:
            UserError: The file cannot be decoded; its name is in the message.
        """
        row = int(self.rows[position])
        if not self.encoded:
            return as_mode(self.dataset[row][0], self.mode)
        # timm's data set would put the next image in the place of one it cannot read.
        try:
            with self.dataset.reader[row][0] as file:
                return decode_picture(file, self.mode)
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise UserError(
                f"Cannot read image {self.name(position)}: {_reason(error)}; repair it, or "
                "leave it out of a new run with --set unreadable=skip."
            ) from error

    def problem(self, position: int) -> str | None:
        """Why an image cannot be decoded; None if it can."""
        try:
            self.image(position)
        except UserError as error:
            return _reason(error.__cause__ or error)
        return None

    @property
    def encoded(self) -> bool:
        """Whether images are files' bytes, which may be damaged, and not pixels already."""
        return getattr(self.dataset, "reader", None) is not None

    def name(self, position: int) -> str:
        """What to call an image in a message: its file, where it has one."""
        row = int(self.rows[position])
        named = self.dataset.reader.filename(row, absolute=True) if self.encoded else None
        return str(named or f"number {row}")

    def paths(self) -> Sequence[Path] | None:
        """The file of each of the data set's items, if they are plain files."""
        samples = getattr(getattr(self.dataset, "reader", None), "samples", None)
        # A tar's samples are an array of members, or a list of them.
        if not isinstance(samples, list) or not samples or not isinstance(samples[0][0], str):
            return None
        return [Path(path) for path, _ in samples]

    def subset(self, positions: Tensor) -> "RawSplit":
        """The images at some positions."""
        return RawSplit(self.dataset, self.rows[positions], self.labels[positions], self.mode)


class PilImages:
    """Images held in memory as a map-style data set."""

    def __init__(self, images: list[Image.Image], targets: list[int], classes: list[str]) -> None:
        self.images = images
        self.targets = targets
        self.classes = classes

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return self.images[row], self.targets[row]

    def __len__(self) -> int:
        return len(self.images)


def raw_split(dataset: Any, mode: str) -> RawSplit:
    """All of a data set's images.

    Args:
        dataset: timm's, torchvision's or our own; streams are read to their end.
        mode: PIL mode that the images are to have.

    Raises:
        UserError: There are none, or their labels are no numbers.
    """
    if isinstance(dataset, IterableDataset):
        dataset = _read_stream(dataset)
    labels = _labels(dataset)
    if len(labels) == 0:
        raise UserError("The data set has no images; check --data-dir and the names of its splits.")
    return RawSplit(dataset, torch.arange(len(labels)), labels, mode)


def _labels(dataset: Any) -> Tensor:
    """Labels without decoding images, where the data set keeps them apart."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(dataset, "targets"):
        values = dataset.targets
    elif hasattr(reader, "label_key"):
        values = list(reader.dataset[reader.label_key])
    elif hasattr(reader, "targets"):
        values = reader.targets
    elif hasattr(reader, "samples"):
        values = [label for _, label in reader.samples]
    else:
        values = [dataset[row][1] for row in range(len(dataset))]
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iub":
        raise UserError(
            f"Labels must be whole numbers, and the first here is {values[0]!r}; store classes as "
            "numbers (ClassLabel)."
        )
    return torch.as_tensor(array).long()


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names by label; empty if the data set has none."""
    names = getattr(dataset, "classes", None)
    if names is None:
        index = class_index(dataset)
        names = sorted(index, key=lambda name: index[name])
    return tuple(str(name) for name in names)


def class_index(dataset: Any) -> dict[str, int]:
    """Numbers by class, under either name that timm's readers have for it."""
    reader = getattr(dataset, "reader", None)
    names = ("class_to_idx", "class_name_to_idx")
    return next((index for name in names if (index := getattr(reader, name, None))), {})


def _reason(error: BaseException) -> str:
    """One line on a decoder's error, without the object it was reading from."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown kind"
    return " ".join(str(error).split()) or type(error).__name__


def _read_stream(dataset: Any) -> PilImages:
    """Hold a stream's images: it has no positions by which it could be split or shuffled."""
    # A reader cuts its stream by rank if a process group exists when it is opened; sources are
    # opened before there is one, so this is the whole stream.
    items = [(item[0], int(item[1])) for item in dataset]
    return PilImages([image for image, _ in items], [label for _, label in items], [])
