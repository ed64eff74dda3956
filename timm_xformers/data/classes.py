"""Classes by name: which label of one list is which of another."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from timm_xformers.data.notes import Note
from timm_xformers.errors import UserError
from timm_xformers.files.text import plain, some

__all__ = ["ONE_CLASS_EACH", "alike_names", "match_names", "refuse_lists", "shared_words"]

# What is said wherever a picture turns out to have several classes.
ONE_CLASS_EACH = (
    "several classes a picture (multi-label) are read by --set multi_label=true loss=bce alone, "
    "from a label file beside a folder of images; else keep one class for each"
)
SEPARATORS = ";|, "

# torchvision calls the first class of MNIST "0 - zero".
SPELLED_DIGIT = re.compile(r"(\d+) - [a-z]+")


def match_names(names: Sequence[str], known: Sequence[str]) -> Tensor:
    """For each name its place among the known ones, -1 where it is not there (N,).

    A name that is not there as it stands is looked for without its case, spaces, hyphens and
    underscores, if then it still means one class.
    """
    places = {name: place for place, name in enumerate(known)}
    taken = set(names) & set(places)
    loose: dict[str, list[int]] = {}
    for place, name in enumerate(known):
        if name not in taken:
            loose.setdefault(_loosely(name), []).append(place)
    wanted = Counter(_loosely(name) for name in names if name not in taken)

    def place_of(name: str) -> int:
        if name in places:
            return places[name]
        key = _loosely(name)
        found = loose.get(key, [])
        return found[0] if len(found) == 1 and wanted[key] == 1 else -1

    return torch.tensor([place_of(name) for name in names], dtype=torch.long)


def refuse_lists(source: str, names: Collection[str]) -> None:
    """Stop where names of classes are lists of others: "cat dog" beside "cat" and "dog".

    A semicolon or bar makes a list of a name in any case; commas and spaces are common in names.

    Raises:
        UserError: With the first such name.
    """
    for name in names:
        for mark in SEPARATORS:
            parts = {part.strip() for part in name.split(mark)}
            if len(parts) > 1 and (mark in ";|" or parts <= {*names}):
                raise UserError(
                    f"{source} has the class {plain(name)!r}, a list of {len(parts)}: "
                    f"{ONE_CLASS_EACH}, or write a hyphen where this is one name."
                )


def alike_names(names: Sequence[str]) -> list[Note]:
    """A line on names that differ in case, spaces, hyphens or underscores alone; or none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_loosely(name), []).append(name)
    if alike := [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]:
        words = "classes of their own, though they look alike: "
        return [Note(f"{words}{some(alike, 3)}", f"{len(alike)} {words.strip(': ')}")]
    return []


def shared_words(names: Sequence[str]) -> list[Note]:
    """A line on names that have words in common, as lists of tags do; or none.

    "haze primary" beside "clear primary" may be two tags a picture each. `refuse_lists` cannot know
    where no tag stands alone, and breeds of dogs look the same.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        for word in dict.fromkeys(re.findall(r"[^\s,]+", name.casefold())):
            found.setdefault(word, []).append(name)
    shared = {name for group in found.values() if len(group) > 1 for name in group}
    if not shared:
        return []
    first = next(group for group in found.values() if len(group) > 1)
    some = " and ".join(repr(plain(name)) for name in first[:2])
    words = "names of classes share words, and each whole text is one class"
    return [Note(f"{len(shared)} {words}: such as {some}", f"{len(shared)} {words}")]


def _loosely(name: str) -> str:
    name = name.casefold()
    if digit := SPELLED_DIGIT.fullmatch(name):
        name = digit[1]
    return re.sub(r"[\s_-]+", "", name)
