"""The picture files below a folder or in a tar, and what else was found there.

Hidden files and folders (``.ipynb_checkpoints``, ``._cat.jpg``) and ``__MACOSX`` are left out, and
so are files that are no pictures by their names. Links are followed, but not back into a folder
that holds them; pipes and other special files are not opened.
"""

import dataclasses
import functools
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from PIL import Image

from timm_xformers.errors import UserError
from timm_xformers.files.text import plain, some

__all__ = ["LeftOut", "Place", "Tree", "by_nature", "is_picture", "read_span"]

# Pillow knows what these are and cannot read them alone, or they hold something else as a rule.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
CLUTTER = ("thumbs.db", "desktop.ini")
SHOWN = 3
# Of what is counted, which may end in the name of a file.
SINGULAR = (
    (r"^(hidden |)(file|folder|image|column)s", r"\1\2"),
    ("that are no part", "that is no part"),
    ("that are no pictures by their names", "that is no picture by its name"),
    ("^broken links, pipes and", "broken link, pipe or"),
)

Span = tuple[int, int]


@functools.cache
def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES
    )


def is_picture(name: str) -> bool:
    """Whether Pillow reads files with a name's suffix."""
    return os.path.splitext(name)[1].lower() in _suffixes()


def by_nature(text: str) -> tuple[list[int | str], str]:
    """Key to sort by as people do: img2 before img10, whatever the case."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdecimal() else part for part in parts], text


class LeftOut:
    """What was left out and why, for one line."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.suffixes: Counter[str] = Counter()

    def add(self, reason: str, names: Iterable[str]) -> None:
        """Count names under a reason, which is a noun in the plural."""
        if found := sorted(names):
            self.names.setdefault(reason, []).extend(found)

    def update(self, other: "LeftOut") -> None:
        """Take over what another has counted."""
        for reason, names in other.names.items():
            self.add(reason, names)
        self.suffixes.update(other.suffixes)

    def __str__(self) -> str:
        """One line with the first names; empty if nothing was left out."""
        return plain("; ".join(f"{what} ({some(names, SHOWN)})" for what, names in self._parts()))

    @property
    def counts(self) -> str:
        """The same without names."""
        return plain(", ".join(what for what, _ in self._parts()))

    def _parts(self) -> list[tuple[str, list[str]]]:
        """How many of what, and their names or kinds."""
        parts = [(_counted(len(names), reason), names) for reason, names in self.names.items()]
        if self.suffixes:
            kinds = [f"{count} {suffix}" for suffix, count in self.suffixes.most_common()]
            count = sum(self.suffixes.values())
            parts.append((_counted(count, "files that are no pictures by their names"), kinds))
        return parts


def _counted(count: int, what: str) -> str:
    """How many of what, which is the plural of something."""
    if count == 1:
        for more, one in SINGULAR:
            what = re.sub(more, one, what)
    return f"{count} {what}"


@dataclasses.dataclass(frozen=True)
class Tree:
    """Picture files, by names below a place with "/" in them.

    Attributes:
        files: Names, in no order.
        folders: Folders right below the place, also those without pictures.
        left_out: Everything else.
    """

    files: list[str]
    folders: set[str]
    left_out: LeftOut


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder on the disk, a tar or a folder in one.

    Attributes:
        path: The folder, or the tar.
        inside: Folder within the tar: empty, or with a "/" at its end.
    """

    path: Path
    inside: str = ""

    @property
    def packed(self) -> bool:
        """Whether it is a tar, or in one."""
        return self.path.is_file()

    def __str__(self) -> str:
        return plain(f"{self.path}/{self.inside}".rstrip("/"))

    def below(self) -> dict[str, "Place"]:
        """Folders right below it that are not hidden, by name; a tar is one without its suffix."""
        if self.packed:
            tops = {name.partition("/")[0] for name in self.members() if "/" in name}
            found = {name: Place(self.path, f"{self.inside}{name}/") for name in tops}
        else:
            entries = {entry.name: Path(entry.path) for entry in _listed(self.path)}
            tars = [name for name in entries if name.endswith(".tar") and entries[name].is_file()]
            found = {name.removesuffix(".tar"): Place(entries[name]) for name in tars}
            found |= {name: Place(path) for name, path in entries.items() if path.is_dir()}
        return {name: found[name] for name in sorted(found) if not _is_hidden(name)}

    def pictures(self) -> list[str]:
        """Names of the pictures right in it."""
        names = self.members() if self.packed else [entry.name for entry in _listed(self.path)]
        return [n for n in names if "/" not in n and not _is_hidden(n) and is_picture(n)]

    def tree(self, without: Collection[str] = ()) -> Tree:
        """Everything in it, but for some folders right below.

        Raises:
            UserError: A folder or the tar cannot be read.
        """
        tree = Tree([], set(), LeftOut())
        hidden, special = set(), []
        for name in self.members() if self.packed else _walk(self.path):
            *above, last = name.split("/")
            if above and above[0] in without:
                continue
            covered = next((i for i, part in enumerate(above) if _is_hidden(part)), None)
            if covered is not None:
                hidden.add("/".join(above[: covered + 1]))
                continue
            tree.folders.update(above[:1])
            if last.endswith("\0"):
                special.append(name[:-1])
            elif last and is_picture(last) and not _is_hidden(last):
                tree.files.append(name)
            elif last and not _is_hidden(last) and last.lower() not in CLUTTER:
                tree.left_out.suffixes[os.path.splitext(last)[1].lower() or "without suffix"] += 1
        tree.left_out.add("hidden folders", hidden)
        tree.left_out.add("broken links, pipes and the like", special)
        return tree

    def members(self) -> dict[str, Span]:
        """Offset and size of a tar's files, by name below the place."""
        facts = self.path.stat()
        index = _index(self.path, facts.st_size, facts.st_mtime_ns)
        start = len(self.inside)
        return {name[start:]: span for name, span in index.items() if name.startswith(self.inside)}


def read_span(path: Path, span: Span) -> BinaryIO:
    """Part of a file, by offset and size in bytes."""
    offset, size = span
    with path.open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(size))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _listed(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {plain(str(folder))}: {error.strerror}; correct its rights or "
            "name another."
        ) from error


def _walk(folder: Path, name: str = "", above: tuple[Span, ...] = ()) -> Iterator[str]:
    """Names of files below a folder; its folders end in "/", and what is neither in NUL."""
    facts = folder.stat()
    identity = facts.st_dev, facts.st_ino
    if identity in above:
        return
    for entry in _listed(folder):
        below = f"{name}{entry.name}"
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link in a circle
            is_folder = is_file = False
        if is_folder:
            yield f"{below}/"
            if not _is_hidden(entry.name):
                yield from _walk(Path(entry.path), f"{below}/", (*above, identity))
        else:
            yield below if is_file else f"{below}\0"


@functools.lru_cache(4)
def _index(path: Path, size: int, changed: int) -> dict[str, Span]:
    """Files of a tar, those of tars in it too; size and time tell when it must be read again."""
    found: dict[str, Span] = {}

    def read(name: str, start: int, file: IO[bytes] | None) -> None:
        with tarfile.open(path if file is None else None, "r:", file) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                inner = os.path.normpath(f"/{member.name}").lstrip("/")
                if inner.lower().endswith(".tar"):
                    read(
                        f"{name}{inner[:-4]}/", start + member.offset_data, tar.extractfile(member)
                    )
                else:
                    found[name + inner] = (start + member.offset_data, member.size)

    try:
        read("", 0, None)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"Cannot open {plain(str(path))}: {' '.join(str(error).split())}; it must be a whole, "
            "uncompressed tar."
        ) from error
    return found
