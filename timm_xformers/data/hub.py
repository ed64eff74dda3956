"""Data sets in the Hub's form, from the Hub or from parquet files here."""

import functools
import inspect
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image
from torch import Tensor

from timm_xformers.data.classes import refuse_lists
from timm_xformers.data.split import Images, label_tensor
from timm_xformers.data.trees import by_nature
from timm_xformers.errors import UserError, nearest, require_extra
from timm_xformers.files.text import one_line, plain

__all__ = ["HubImages", "HubSplits"]

T = TypeVar("T")

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixels", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target", "cls")


class HubImages(Images):
    """Rows with a picture and a class.

    Args:
        rows: Pictures by row, not decoded: a data set or a list.
        column: Where they are.
        classes: Class of each: numbers, or names that are numbered in their order.
        class_names: By label; empty if nobody names them.
    """

    def __init__(
        self, rows: Any, column: str, classes: Sequence[Any], class_names: Sequence[str] = ()
    ) -> None:
        self.texts: Sequence[str] = ()  # classes that have come as words, not as numbers
        if not class_names and classes and all(isinstance(name, str) for name in classes):
            self.texts = class_names = sorted(set(classes), key=by_nature)
            refuse_lists("The data set", class_names)
            number = {name: label for label, name in enumerate(class_names)}
            classes = [number[name] for name in classes]
        self.rows = rows
        self.column = column
        self.labels: Tensor = label_tensor(classes)
        self.class_names = tuple(map(plain, class_names))

    def open(self, row: int) -> BinaryIO | Image.Image:
        """The picture's file, as it is stored in the row or named there."""
        found = self.rows[row][self.column]
        if isinstance(found, Image.Image):
            return found
        if found is None:
            raise UserError("the row has no picture")
        if found.get("bytes"):
            return io.BytesIO(found["bytes"])
        return Path(found["path"]).open("rb")

    def name(self, row: int) -> str:
        """The file that the picture was made from, where the row says it."""
        found = self.rows[row][self.column]
        named = found.get("path") if isinstance(found, dict) else None
        return str(named) if named else super().name(row)


class HubSplits:
    """The splits of a data set, by name.

    Args:
        name: On the Hub, or a folder.
        cache: Folder for what is downloaded; None for the usual one.
        labels: Column of the classes; None for the usual one.
        stream: Read without storing the whole set on the disk; its images are then held in memory.

    Raises:
        UserError: It cannot be opened.
    """

    def __init__(self, name: str, cache: str | None, labels: str | None, *, stream: bool) -> None:
        require_extra("data", "datasets")
        import datasets

        datasets.disable_progress_bars()
        self.name, self.labels = plain(name), labels
        options: dict[str, Any] = {"cache_dir": cache, "streaming": stream}
        if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:
            options["trust_remote_code"] = False  # datasets before 4 would ask at the terminal
        self._load = functools.partial(datasets.load_dataset, name, **options)
        self.splits: Mapping[str, Any] = self._tried(self._load)

    def open(self, split: str) -> HubImages:
        """A split, or an expression such as ``train[:90%]``.

        Raises:
            UserError: It cannot be read, or has no column of pictures or of classes.
        """
        return self._tried(self._images, split)

    def ranges(self, split: str) -> list[tuple[str, float, float]]:
        """Split, first row and row after the last, of a split or of each part of an expression.

        Raises:
            UserError: There is no such split.
        """
        import datasets

        if split in self.splits:
            return [(split, 0, math.inf)]
        if re.fullmatch(r"[\w.-]+", split):
            raise UserError(
                f"{self.name} has no split {split!r}; it has {plain(', '.join(self.splits))}."
            )
        sizes = {name: len(rows) for name, rows in self.splits.items()}
        spec = self._tried(datasets.ReadInstruction.from_spec, split)
        parts: Any = self._tried(spec.to_absolute, sizes)
        return [(part.splitname, part.from_, part.to) for part in parts]

    def _images(self, split: str) -> HubImages:
        import datasets

        found = self.splits[split] if split in self.splits else self._load(split=split)
        stream = isinstance(found, datasets.IterableDataset)
        features = found.features or dict.fromkeys(next(iter(found)))
        image, label = _columns(features, self.labels)
        if found.features is not None:
            found = found.cast_column(image, datasets.Image(decode=False))
        rows = list(found) if stream else found.select_columns([image])
        classes = [row[label] for row in rows] if stream else list(found[label])
        return HubImages(rows, image, classes, getattr(features[label], "names", None) or ())

    def _tried(self, load: Callable[..., T], *args: Any) -> T:
        try:
            return load(*args)
        except UserError:
            raise
        except Exception as error:  # each format has failures of its own
            cause = error.__cause__ or error
            raise UserError(f"Cannot open {self.name}: {one_line(cause)}") from error


def _columns(features: Mapping[str, Any], labels: str | None) -> tuple[str, str]:
    """Names of the columns of pictures and of classes."""
    kinds = {name: _kind(feature) for name, feature in features.items()}
    there = plain(", ".join(f"{name} ({kind})" for name, kind in kinds.items()))
    usual = [name for name in IMAGE_COLUMNS if name in kinds]
    images = [name for name, kind in kinds.items() if kind == "Image"]
    image = next(iter([name for name in usual if name in images] or images or usual), None)
    if image is None:
        raise UserError(f"The data set has no column of pictures; its columns are {there}.")
    if labels is not None and labels not in kinds:
        raise UserError(
            f"The data set has no column {labels!r}{nearest(labels, kinds)}; its columns are "
            f"{there}."
        )
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    usual = [name for name in LABEL_COLUMNS if name in kinds]
    label = labels or next(iter(usual or (classes if len(classes) == 1 else [])), None)
    if label is None:
        raise UserError(
            f"The data set has no column of classes by a usual name ({', '.join(LABEL_COLUMNS)}); "
            f"its columns are {there}: name one by --labels COLUMN."
        )
    return image, label


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
