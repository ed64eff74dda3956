"""Writing any data set as webdataset shards, as `shards` reads them."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from timm_xformers.data.sampling import derive_seed
from timm_xformers.data.shards import INFO_NAMES
from timm_xformers.data.sources import open_source
from timm_xformers.data.split import Split
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import write_text
from timm_xformers.recipe import Recipe

__all__ = ["write_shards"]

# Formats that are copied as they are; others become PNG, which loses nothing.
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_shards(recipe: Recipe, folder: Path, images_per_shard: int) -> dict[str, list[int]]:
    """Write every split of a recipe's data set, in an order drawn once.

    They go to a new or empty folder, with so many images in each tar but the last; ``_info.json``
    is written last.

    Returns:
        Numbers of images in the shards of each split.

    Raises:
        UserError: The data or the folder is at fault.
    """
    if images_per_shard < 1:
        raise UsageError(f"images_per_shard={images_per_shard} writes nothing; use 1 or more.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty; choose another --output.")
    source = open_source(recipe)
    splits = {"train": source.train, "validation": source.val, "test": source.test}
    if source.val is None:  # sources call their only held-out part a test set; shards do not
        splits = {"train": source.train, "validation": source.test}
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    for name, split in splits.items():
        if split is not None:
            described[name] = _write_split(name, split, folder, images_per_shard)
    info = {"class_names": list(source.class_names), "splits": described}
    write_text(folder / INFO_NAMES[0], json.dumps(info, indent=1))
    return {name: entry["shard_lengths"] for name, entry in described.items()}


def _write_split(name: str, split: Split, folder: Path, size: int) -> Mapping[str, Any]:
    generator = torch.Generator().manual_seed(derive_seed("shards", name))
    order = torch.randperm(len(split), generator=generator)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    digits = max(4, len(str(len(groups) - 1)))
    names = [f"{name}-{number:0{digits}d}.tar" for number in range(len(groups))]
    for file, positions in zip(names, groups, strict=True):
        _write_tar(folder / file, _members(split, positions.tolist()))
    return {
        "name": name,
        "num_samples": len(split),
        "filenames": names,
        "shard_lengths": [len(positions) for positions in groups],
    }


def _members(split: Split, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    for position in positions:
        kind, content = _encoded(split, position)
        yield f"{position:08d}.{kind}", content
        yield f"{position:08d}.cls", str(int(split.labels[position])).encode()


def _encoded(split: Split, position: int) -> tuple[str, bytes]:
    if split.encoded:
        try:
            content = split.content(position)
            with Image.open(io.BytesIO(content)) as image:
                kind = KINDS.get(image.format or "")
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise UserError(
                f"Cannot read image {split.name(position)}; repair or remove it."
            ) from error
        if kind is not None:
            return kind, content
    buffer = io.BytesIO()
    split.image(position).save(buffer, "PNG")
    return "png", buffer.getvalue()


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
