"""Finding images that cannot be read, before training wants them.

What is looked at follows from what it costs. Decoding each file fully would cost an epoch, so the
default policy, ``error``, looks at each file's head and tail: that finds what is empty, cut off or
no image at all. Damage inside a file is found when it is decoded, which stops the run and names it:
before the first step if images are held in memory (`memory.decode`), else when it is met. ``skip``
must know beforehand which images there are, as the order of an epoch follows from their number; it
decodes everything once. No image is ever put in the place of another.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from timm_xformers.data.loader import map_positions
from timm_xformers.data.split import Split
from timm_xformers.errors import UserError

__all__ = ["drop_damaged", "find_cut_files", "refuse_damaged"]

# Files of which the ends are looked at, spread evenly: minutes on a slow disk, not hours.
CHECKED_FILES = 50_000
NAMED_FILES = 10


def refuse_damaged(problems: Sequence[tuple[str, str]], total: int) -> None:
    """Stop if there are problems, names of images and what is wrong with them, among all images.

    Raises:
        UserError: With the first of them and their number.
    """
    if not problems:
        return
    names = ", ".join(name for name, _ in problems[:NAMED_FILES])
    more = f" and {len(problems) - NAMED_FILES} more" if len(problems) > NAMED_FILES else ""
    first, them = ("the first: ", "them") if len(problems) > 1 else ("", "it")
    raise UserError(
        f"Cannot read {len(problems)} of {total} images: {names}{more} ({first}{problems[0][1]}); "
        f"repair {them}, or leave {them} out of a new run with --set unreadable=skip."
    )


def find_cut_files(split: Split) -> list[tuple[str, str]]:
    """Look at head and tail of image files; images kept otherwise are not looked at.

    A file that looks wrong is decoded before it is said to be: some have bytes after their end.

    Returns:
        Names of images, and what is wrong with them.
    """
    count = len(split)
    looked_at = min(count, CHECKED_FILES)
    problems = []
    for number in range(looked_at):
        position = number * count // looked_at
        path = split.path(position)
        if path is not None and not _looks_whole(path):
            problem = split.problem(position)
            if problem is not None:
                problems.append((split.name(position), problem))
    return problems


def drop_damaged(split: Split, num_workers: int) -> tuple[Split, tuple[str, ...]]:
    """Decode every image once: the readable part, and the names of the other images.

    Raises:
        UserError: No image can be read.
    """
    if not split.encoded:
        return split, ()
    problems = map_positions(split.problem, len(split), num_workers)
    readable = torch.tensor([problem is None for problem in problems])
    if not readable.any():
        raise UserError(
            f"Not one of {len(split)} images can be read, the first is {split.name(0)}; check the "
            "data set."
        )
    lost: Tensor = (~readable).nonzero().squeeze(1)
    names = tuple(split.name(position) for position in lost.tolist())
    return split.subset(readable.nonzero().squeeze(1)), names


def _looks_whole(path: Path) -> bool:
    """Whether a file has an image's head and its format's end."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return _ends_well(file, image.format)
    except Exception:  # whatever a decoder makes of other bytes
        return False


def _ends_well(file: BinaryIO, kind: str | None) -> bool:
    size = file.seek(0, 2)
    if kind == "WEBP":
        file.seek(4)
        return bool(struct.unpack("<I", file.read(4))[0] + 8 <= size)
    file.seek(max(0, size - 8))
    tail = file.read()
    if kind == "PNG":
        return tail[:4] == b"IEND"
    return kind in ("JPEG", "MPO") and tail.endswith(b"\xff\xd9")
