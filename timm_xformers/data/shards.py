"""Webdataset shards: uncompressed tars in which an image and its label share a name.

``n01440764_10026.jpg`` and ``n01440764_10026.cls`` (a number as text) are one sample. Shards are
made to be streamed, but a stream has no positions: it can be shuffled only within a buffer, gives
processes unequal shares and cannot be continued exactly. So the tars are indexed once, at the cost
of reading their headers, and an image is then read by where it lies, as from a folder: every epoch
is one permutation of all images, cut by process, and a run goes on to the same bits.

Beside the shards there may be timm's ``_info.json``, whose splits name their files. Without it, a
split is all tars with its name between hyphens, as in ``imagenet1k-train-0000.tar``.
"""

import contextlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from timm_xformers.data.split import Images, label_tensor
from timm_xformers.data.trees import is_picture, read_span
from timm_xformers.errors import UserError
from timm_xformers.files.atomic import write_file
from timm_xformers.files.text import plain

__all__ = ["INFO_NAMES", "Shards", "find_shards", "open_shards"]

INFO_NAMES = ("_info.json", "info.json")
# Headers are read by so many threads: on a network, each waits for a reply.
THREADS = 16
# Shard, offset in bytes, size in bytes, label.
COLUMNS = 4


class Shards(Images):
    """Images of some tars by position.

    Args:
        paths: The tars.
        index: Shard, offset, size and label of each image (N, 4).
        classes: Names by label, if they are known.
    """

    def __init__(
        self, paths: Sequence[Path], index: NDArray[np.int64], classes: Sequence[str]
    ) -> None:
        self.files = list(paths)
        self.index = index
        self.labels = label_tensor(index[:, 3])
        self.class_names = tuple(map(plain, classes))

    def open(self, row: int) -> BinaryIO:
        """The image's bytes."""
        shard, offset, size, _ = self.index[row].tolist()
        return read_span(self.files[shard], (offset, size))

    def name(self, row: int) -> str:
        """The tar, and the image's name within."""
        shard, offset, _, _ = self.index[row].tolist()
        header = read_span(self.files[shard], (offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE))
        name = tarfile.TarInfo.frombuf(header.read(), "utf-8", "surrogateescape").name
        return f"{self.files[shard]}/{name}"

    def key(self, row: int) -> str:
        """Where it lies."""
        shard, offset, size, _ = self.index[row].tolist()
        return f"{self.files[shard].name}:{offset}:{size}"


def find_shards(root: Path, split: str) -> list[Path]:
    """The tars of a split; none if there is no such split.

    Args:
        root: Folder of the shards.
        split: Name of a split, or a pattern of file names such as ``train-{0000..1023}.tar``, to
            which timm's ``|NUMBER`` may be added.

    Raises:
        UserError: Tars that a pattern or ``_info.json`` names are missing.
    """
    pattern = split.partition("|")[0]
    named = _info(root)["splits"].get(split, {}).get("filenames")
    if named is None and pattern.endswith(".tar"):
        named = [name for part in pattern.split("::") for name in _expand(part)]
    if named is None:
        return [
            path
            for path in sorted(root.glob("*.tar"))
            if split in re.split(r"[-_.]", path.name.removesuffix(".tar"))
        ]
    paths = [root / name for name in named]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {len(paths)} shards of {split!r}, the first is "
            f"{missing[0]}; bring them there or correct the name of the split."
        )
    return paths


def open_shards(root: Path, split: str, paths: Sequence[Path]) -> Shards:
    """Index the tars of a split, or take the index that an earlier run left beside them.

    The index holds the tars' names, sizes and times, and is made again if one changed. Where the
    folder cannot be written it is made by every process of every run.

    Raises:
        UserError: A tar is damaged, compressed or no webdataset, or has another number of images
            than ``_info.json`` says.
    """
    stats = [(path, path.stat()) for path in paths]
    state = json.dumps([[str(p.name), s.st_size, s.st_mtime_ns] for p, s in stats])
    place = root / f".index-{re.sub(r'[^A-Za-z0-9]+', '_', split)}.npz"
    index = _load_index(place, state)
    if index is None:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(_scan, paths))
        parts = [
            np.array([(number, *row) for row in rows], dtype=np.int64).reshape(-1, COLUMNS)
            for number, rows in enumerate(found)
        ]
        index = np.concatenate(parts)
        _check_lengths(root, split, paths, [len(part) for part in parts])
        _save_index(place, state, index)
    return Shards(paths, index, _info(root)["class_names"])


def _info(root: Path) -> dict[str, Any]:
    """What ``_info.json`` says: class_names, and for each of splits filenames, shard_lengths."""
    for path in (root / name for name in INFO_NAMES):
        if path.is_file():
            try:
                info = json.loads(path.read_text(encoding="utf-8"))
                splits = {name: dict(split) for name, split in info.get("splits", {}).items()}
                names = info.get("class_names") or []
                for texts in (names, *(split.get("filenames", []) for split in splits.values())):
                    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                        raise TypeError("class_names and filenames must be lists of texts")
                for split in splits.values():
                    lengths = split.get("shard_lengths", [0] * len(split.get("filenames", [])))
                    if not all(type(n) is int for n in lengths) or (
                        "filenames" in split and len(lengths) != len(split["filenames"])
                    ):
                        raise TypeError("shard_lengths must be a number for each of filenames")
                return {"class_names": names, "splits": splits}
            except (AttributeError, TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{path} is no description of shards: {' '.join(str(error).split())}; repair "
                    "or remove it."
                ) from error
    return {"class_names": [], "splits": {}}


def _expand(pattern: str) -> Iterator[str]:
    """Names for each number of ``{0000..1023}``, which may occur more than once."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        text = f"{number:0{len(match[1])}d}"
        yield from _expand(pattern[: match.start()] + text + pattern[match.end() :])


def _scan(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and label of a tar's images, by its headers and labels alone."""
    rows: list[tuple[int, int, int]] = []
    key = ""
    image: tuple[int, int] | None = None
    label: int | None = None

    def finish() -> None:
        if image is not None and label is not None:
            rows.append((*image, label))
        elif image is not None or label is not None:
            lacking = "label (.cls)" if label is None else "image (.jpg, .png or such)"
            raise UserError(
                f"{key} in {path} has no {lacking}; write the shards again, for instance by "
                "timm-xformers shards."
            )

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if folder + slash + stem != key:
                    finish()
                    key, image, label = folder + slash + stem, None, None
                if "." not in kind and is_picture(name):
                    if image is not None:
                        raise UserError(f"{key} in {path} has two images; write one for each name.")
                    image = (member.offset_data, member.size)
                elif kind == "cls":
                    content = tar.extractfile(member)
                    label = int(content.read()) if content is not None else None
            finish()
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Cannot index {path}: {' '.join(str(error).split())}; it must be a whole, "
            "uncompressed tar of images and .cls files."
        ) from error
    return rows


def _check_lengths(root: Path, split: str, paths: Sequence[Path], found: Sequence[int]) -> None:
    expected = _info(root)["splits"].get(split, {}).get("shard_lengths")
    for path, told, count in zip(paths, expected or found, found, strict=False):
        if told != count:
            raise UserError(
                f"{path} holds {count} images, and the description beside it says {told}; bring "
                "the shard again or correct the description."
            )


def _load_index(place: Path, state: str) -> NDArray[np.int64] | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["state"]) != state:
                return None
            index: NDArray[np.int64] = stored["index"]
            return index if index.ndim == 2 and index.shape[1] == COLUMNS else None
    except Exception:  # half written, damaged or of another version: made again
        return None


def _save_index(place: Path, state: str, index: NDArray[np.int64]) -> None:
    # A folder that cannot be written to is indexed anew each time.
    with contextlib.suppress(OSError), write_file(place) as fresh:
        np.savez(fresh, state=np.array(state), index=index)
