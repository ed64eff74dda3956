"""Where images come from: scikit-learn's digits, well-known small sets, folders, timm's schemes.

A source is opened, not decoded: it says how many images it has, their labels and their names.

A source with a validation part and no test part is tested on that part, and its validation images
come from training. So it is with Tiny ImageNet, whose test labels were never published: 200 classes
of 64 x 64 pixels, some grey (read as RGB), 100,000 training images, and 10,000 for the test.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset, get_img_extensions

from timm_xformers.data.known_sets import KNOWN_SETS, KnownSet
from timm_xformers.data.rawsplit import (
    PilImages,
    RawSplit,
    class_index,
    class_names,
    raw_split,
)
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.shards import find_shards, open_shards
from timm_xformers.errors import UsageError, UserError, nearest, require_extra
from timm_xformers.recipe import Recipe

__all__ = ["Source", "open_source"]

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "val", "valid", "eval", "evaluation")
TEST_NAMES = ("test", "testing")


@dataclass(frozen=True)
class Source:
    """What a data set offers of itself; a split it does not have is None."""

    train: RawSplit
    val: RawSplit | None
    test: RawSplit | None
    class_names: tuple[str, ...]


def open_source(recipe: Recipe) -> Source:
    """Find the data set of a recipe.

    Raises:
        UserError: It is unknown, missing or empty.
    """
    if recipe.in_chans not in (None, 1, 3):
        raise UsageError(f"in_chans={recipe.in_chans}: images are read as 1 (grey) or 3 (RGB).")
    name, known = recipe.data, KNOWN_SETS.get(recipe.data)
    in_chans = recipe.in_chans or (known.in_chans if known else 3)
    mode = "L" if in_chans == 1 else "RGB"
    if name == "digits":
        return _digits(recipe, mode)
    if name in ("folder", "torch/folder", "torch/image_folder"):
        return _folder(recipe, mode)
    if known is not None:
        return _scheme(_locate_known(recipe, known), recipe, mode)
    prefix, slash, _ = name.partition("/")
    if slash and prefix.lower() == "wds":
        return _shards(recipe, mode)
    if slash and prefix.lower() in ("torch", "hfds", "hfids", "tfds"):
        return _scheme(name, recipe, mode)
    names = [*KNOWN_SETS, "folder"]
    raise UsageError(
        f"Unknown data set {name!r}{nearest(name, names)}; use {', '.join(names)}, or a timm "
        "scheme such as torch/NAME, hfds/NAME or wds/NAME."
    )


def _digits(recipe: Recipe, mode: str) -> Source:
    if recipe.train_split or recipe.val_split or recipe.test_split:
        raise UsageError("The splits of digits are fixed; drop train_split and its like.")
    require_extra("train", "sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), stored as 0 ... 16
    labels = digits.target.tolist()
    dataset = PilImages([Image.fromarray(image) for image in pixels], labels, list("0123456789"))
    whole = raw_split(dataset, mode)
    train, test = stratified_split(whole.labels, 1 / 3, "digits/test")
    return Source(whole.subset(train), None, whole.subset(test), tuple(dataset.classes))


def _locate_known(recipe: Recipe, known: KnownSet) -> str:
    """The timm scheme for a known set: torchvision's layout or a folder of parquet files."""
    name = recipe.data
    if known.layout is None and recipe.download:
        raise UsageError(f"torchvision has no {name} to download; drop download.")
    if recipe.data_dir is None:
        places = "parquet files"
        if known.layout is not None:
            places = (
                f"torchvision's layout ({known.layout}) or {places}, or with --set download=true"
            )
        raise UserError(f"{name} needs a folder: pass --data-dir with {places}.")
    root = Path(recipe.data_dir)
    if known.layout is not None and ((root / known.layout).exists() or recipe.download):
        return f"torch/{name}"
    for folder in (root, root / name):
        if any(folder.glob("*.parquet")):
            return f"hfds/{folder.resolve()}"
    if known.layout is None:
        raise UserError(f"No {name} in {root}: no *.parquet is there; correct --data-dir.")
    raise UserError(
        f"No {name} in {root}: neither {known.layout} nor *.parquet is there; correct --data-dir "
        "or add --set download=true."
    )


def _folder(recipe: Recipe, mode: str) -> Source:
    if recipe.data_dir is None:
        raise UserError("Training on a folder of images needs --data-dir FOLDER.")
    root = Path(recipe.data_dir)
    if not root.exists():
        raise UserError(f"--data-dir {root} does not exist; name a folder (or .tar) of images.")

    def find(wanted: str | None, usual: tuple[str, ...]) -> Path | None:
        if wanted is not None and not (root / wanted).exists():
            raise UserError(f"There is no {wanted!r} in {root}; correct the name of the split.")
        names = [wanted] if wanted else [name + end for name in usual for end in ("", ".tar")]
        return next((root / name for name in names if (root / name).exists()), None)

    train_root = find(recipe.train_split, TRAIN_NAMES) or root
    train = _open("", train_root, mode, search_split=False)
    class_map = class_index(train)
    _refuse_empty_classes(train_root, class_map)

    def held_out(wanted: str | None, usual: tuple[str, ...]) -> Any:
        path = find(wanted, usual)
        if path is None:
            return None
        found = _open("", path, mode, search_split=False)
        strangers = sorted(set(class_index(found)) - set(class_map))
        if strangers:
            raise UserError(
                f"{path} has classes that the training images lack: {', '.join(strangers[:5])}; "
                "make the folders agree."
            )
        # Numbers follow from the training folders: a class may be absent from a smaller split.
        return _open("", path, mode, search_split=False, class_map=class_map)

    val = held_out(recipe.val_split, VAL_NAMES)
    test = held_out(recipe.test_split, TEST_NAMES)
    return _source(recipe, mode, train, val, test)


def _source(recipe: Recipe, mode: str, train: Any, val: Any, test: Any) -> Source:
    """Put timm's data sets together: a lone second split is for the test unless named otherwise."""
    if test is None and recipe.val_split is None:
        val, test = None, val
    return Source(
        raw_split(train, mode),
        None if val is None else raw_split(val, mode),
        None if test is None else raw_split(test, mode),
        class_names(train),
    )


def _refuse_empty_classes(root: Path, known: Collection[str]) -> None:
    """A class without images has no number; left unsaid, the later classes would be renumbered."""
    # Folders of folders, hidden ones and those of tools are not classes.
    empty = [
        os.path.relpath(folder, root)
        for folder, subfolders, _ in os.walk(root, followlinks=True)
        if folder != str(root)
        and not subfolders
        and (name := os.path.basename(folder)) not in known
        and not name.startswith((".", "_"))
    ]
    if empty:
        named = ", ".join(sorted(empty)[:5])
        named += f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        kinds = ", ".join(get_img_extensions())  # type: ignore[no-untyped-call]
        raise UserError(
            f"{root} has class folders without images ({kinds}): {named}; "
            "add images or remove the folders."
        )


def _shards(recipe: Recipe, mode: str) -> Source:
    """Webdataset shards, which are read by position and not by timm's streams."""
    if recipe.data_dir is None:
        raise UserError(f"{recipe.data} needs --data-dir: the folder that holds the shards.")
    root = Path(recipe.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is no folder; name one that holds shards.")

    def find(wanted: str | None, usual: tuple[str, ...]) -> Any:
        for split in [wanted] if wanted else usual:
            if paths := find_shards(root, split):
                return open_shards(root, split, paths)
        if wanted:
            raise UserError(f"{root} has no shards of {wanted!r}; correct the name of the split.")
        return None

    train = find(recipe.train_split, TRAIN_NAMES)
    if train is None:
        raise UserError(
            f"No training shards in {root}: there is no _info.json and no NAME-train-NUMBER.tar; "
            "correct --data-dir, or add --set train_split='NAME-{0000..0099}.tar'."
        )
    test, val = find(recipe.test_split, TEST_NAMES), find(recipe.val_split, VAL_NAMES)
    return _source(recipe, mode, train, val, test)


def _scheme(name: str, recipe: Recipe, mode: str) -> Source:
    prefix = name.partition("/")[0].lower()
    if prefix in ("hfds", "hfids"):
        require_extra("data", "datasets")
        _quiet_datasets()
    # hfds takes a cache folder where the others take the data, so a path belongs in its name.
    root = None if name.startswith("hfds//") else recipe.data_dir
    if prefix in ("torch", "tfds"):
        if root is None:
            raise UserError(f"{name} needs --data-dir: the folder that holds or receives it.")
        if not recipe.download and not Path(root).exists():
            raise UserError(f"--data-dir {root} does not exist; correct it.")

    def find(wanted: str | None, usual: tuple[str, ...]) -> Any:
        for split in [wanted] if wanted else usual:
            try:
                return _open(name, root, mode, split=split, download=recipe.download)
            except UserError:
                if wanted:
                    raise
        return None

    train = _open(name, root, mode, split=recipe.train_split or "train", download=recipe.download)
    test = find(recipe.test_split, TEST_NAMES)
    # torchvision's sets know two splits, and timm takes any other name for the second one.
    fixed = prefix == "torch" and test is not None and recipe.val_split is None
    val = None if fixed else find(recipe.val_split, VAL_NAMES)
    return _source(recipe, mode, train, val, test)


def _quiet_datasets() -> None:
    import datasets

    datasets.disable_progress_bars()


def _open(name: str, root: Path | str | None, mode: str, **kwargs: Any) -> Any:
    """Open timm's data set, with its many kinds of failure turned into one."""
    try:
        return create_dataset(
            name, root=None if root is None else str(root), input_img_mode=mode, **kwargs
        )
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        where = name or root
        raise UserError(f"Cannot open {where}: {detail}") from error
