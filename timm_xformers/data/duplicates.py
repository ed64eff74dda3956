"""Pictures that stand in two parts under different names."""

import hashlib
import itertools
from collections.abc import Mapping

from timm_xformers.data.notes import Note
from timm_xformers.data.split import Split

__all__ = ["TWICE", "shared_pictures"]

TWICE = "the same picture twice, which flatters the figures: "

# More are not looked through: reading them would take minutes on a slow disk.
LOOKED_THROUGH = 50_000


def shared_pictures(splits: Mapping[str, Split]) -> list[Note]:
    """A line on pictures of one part whose files are, byte for byte, also in another.

    Only files of a size that both parts have are read; parts without files are passed over.
    """
    encoded = {name: split for name, split in splits.items() if split.encoded}
    if sum(map(len, encoded.values())) > LOOKED_THROUGH:
        return []
    sizes = {
        name: [_size(split, position) for position in range(len(split))]
        for name, split in encoded.items()
    }
    words, counts = [], []
    for first, second in itertools.combinations(encoded, 2):
        common = ({*sizes[first]} & {*sizes[second]}) - {None}
        digests = [
            {
                hashlib.sha256(split.content(position)).digest(): split.name(position)
                for position, size in enumerate(sizes[name])
                if size in common
            }
            for name, split in ((first, encoded[first]), (second, encoded[second]))
        ]
        if both := [digest for digest in digests[1] if digest in digests[0]]:
            names = " and ".join(found[both[0]] for found in digests)
            counts.append(f"{len(both)} in {first} and {second}")
            words.append(f"{counts[-1]} (such as {names})")
    if not words:
        return []
    return [Note(TWICE + "; ".join(words), TWICE + ", ".join(counts))]


def _size(split: Split, position: int) -> int | None:
    """Bytes of a file; None if it cannot be read, which others will say."""
    path = split.path(position)
    try:
        return len(split.content(position)) if path is None else path.stat().st_size
    except Exception:
        return None
