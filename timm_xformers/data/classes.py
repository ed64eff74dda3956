"""Classes by name: which label of one list is which of another."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["match_names"]

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


def _loosely(name: str) -> str:
    name = name.casefold()
    if digit := SPELLED_DIGIT.fullmatch(name):
        name = digit[1]
    return re.sub(r"[\s_-]+", "", name)
