"""Which images and labels a run works with, as hashes: other data is never taken for the same."""

import hashlib
import json
from typing import Any

from timm_xformers.data.data import Data

__all__ = ["changes", "describe", "digest_of"]


def describe(data: Data) -> dict[str, Any]:
    """Class names, and for every split its number of images and a hash of names and labels.

    A data set may be moved; see `Split.digest`.
    """
    return {
        "class_names": list(data.class_names),
        "splits": {
            name: {"images": len(split), "digest": split.digest()}
            for name, split in data.splits.items()
        },
    }


def digest_of(description: dict[str, Any]) -> str:
    """One short hash of what `describe` gave, for records."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two descriptions, in words; empty if nothing does."""
    found = []
    old_names, new_names = before["class_names"], now["class_names"]
    if old_names != new_names:
        gone = [name for name in old_names if name not in new_names]
        new = [name for name in new_names if name not in old_names]
        parts = [f"without {', '.join(gone[:5])}"] if gone else []
        parts += [f"with {', '.join(new[:5])}"] if new else []
        found.append(f"classes {' and '.join(parts) or 'in another order'}")
    for name in {**before["splits"], **now["splits"]}:
        old, new = before["splits"].get(name), now["splits"].get(name)
        if old == new:
            continue
        counts = [0 if split is None else split["images"] for split in (old, new)]
        if counts[0] != counts[1]:
            found.append(f"{counts[1]} {name} images instead of {counts[0]}")
        else:
            found.append(f"other names or labels among the {counts[0]} {name} images")
    return "; ".join(found)
