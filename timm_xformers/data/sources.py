"""Where images come from: scikit-learn's digits, well-known small sets, folders, timm's schemes.

A source is opened, not decoded: it says how many images it has, their labels and their names.

A source with a validation part and no test part is tested on that part, and its validation images
come from training. So it is with Tiny ImageNet, whose test labels were never published: 200 classes
of 64 x 64 pixels, some grey (read as RGB), 100,000 training images, and 10,000 for the test.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from timm_xformers.data.classes import match_names, shared_words
from timm_xformers.data.folders import ROLES, open_folder
from timm_xformers.data.hub import HubImages, HubSplits
from timm_xformers.data.known_sets import KNOWN_SETS, KnownSet
from timm_xformers.data.notes import Note
from timm_xformers.data.sampling import stratified_split
from timm_xformers.data.shards import find_shards, open_shards
from timm_xformers.data.split import Images, PilImages, Split, split_of
from timm_xformers.errors import UsageError, UserError, nearest, require_extra
from timm_xformers.files.text import one_line, plain
from timm_xformers.recipe import Recipe

__all__ = ["Source", "open_source"]

# What a role takes: the name of a split or file, its first row and the one after its last.
Range = tuple[str, float, float]

EVERYTHING = ("train", "val", "test")
FOLDERS = ("folder", "torch/folder", "torch/image_folder")


@dataclass(frozen=True)
class Source:
    """What a data set offers of itself; a split it does not have is None.

    Attributes:
        train: Images to train on; None only where these were not asked for.
        val: Images to choose an epoch by.
        test: Images for the final figure.
        class_names: By label; empty if nobody names them.
        notes: Lines on what was found and what of it is in no split.
    """

    train: Split | None
    val: Split | None
    test: Split | None
    class_names: tuple[str, ...]
    notes: tuple[Note, ...] = ()

    def only(self, roles: Collection[str]) -> "Source":
        """The source without the splits for other roles."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        train, val, test = (splits[role] if role in roles else None for role in splits)
        return replace(self, train=train, val=val, test=test)

    @property
    def splits(self) -> list[Split]:
        """Those that there are."""
        return [split for split in (self.train, self.val, self.test) if split is not None]


def open_source(recipe: Recipe, used: Collection[str] = EVERYTHING) -> Source:
    """Find the data set of a recipe.

    Args:
        recipe: Names it.
        used: Roles of the splits that will be read; see `open_folder`.

    Raises:
        UserError: It is unknown, missing or empty.
    """
    if recipe.in_chans not in (None, 1, 3):
        raise UsageError(f"in_chans={recipe.in_chans}: images are read as 1 (grey) or 3 (RGB).")
    tested = recipe.test_split != "none"
    if not tested:
        recipe = replace(recipe, test_split=None)
    name, known = recipe.data, KNOWN_SETS.get(recipe.data)
    in_chans = recipe.in_chans or (known.in_chans if known else 3)
    mode = "L" if in_chans == 1 else "RGB"
    scheme = name if known is None or name == "digits" else _locate_known(recipe, known)
    prefix, slash, rest = scheme.partition("/")
    prefix = prefix.lower() if slash else ""
    if recipe.labels is not None and name not in FOLDERS:
        if recipe.unlabelled:
            raise UsageError(
                f"labels=none is for folders of images; drop it for {name}, whose labels are known."
            )
        if prefix not in ("hfds", "hfids"):
            raise UsageError(
                f"labels is for folders of images and Hub data sets; drop it for {name}."
            )
    if recipe.multi_label and (recipe.labels is None or name not in FOLDERS):
        raise UsageError(
            "multi_label, several classes a picture, is read from a label file beside a folder of "
            "images; name both: --data-dir FOLDER --labels FILE.csv."
        )
    if name == "digits":
        source = _digits(recipe, mode)
        return source if tested else replace(source, test=None)
    notes: list[Note] = []
    if name in FOLDERS:
        found, notes = open_folder(recipe, used)
        parts: Mapping[str, Images] = found
    elif prefix in ("hfds", "hfids"):
        # datasets takes a cache folder where the others take the data, so a path is the name.
        cache = None if rest.startswith("/") else recipe.data_dir
        hub = HubSplits(rest, cache, recipe.labels, stream=prefix == "hfids")
        rows = _find_hub(recipe, hub, used)
        parts = rows
        notes = shared_words(sorted({n for part in rows.values() for n in part.texts}))
    elif prefix == "wds":
        parts = _find_shards(recipe)
    elif prefix in ("torch", "tfds"):
        parts = _find_timm(scheme, recipe, mode)
    else:
        names = [*KNOWN_SETS, "folder"]
        raise UsageError(
            f"Unknown data set {name!r}{nearest(name, names)}; use {', '.join(names)}, or a timm "
            "scheme such as torch/NAME, hfds/NAME or wds/NAME."
        )
    if not tested:
        parts = {role: images for role, images in parts.items() if role != "test"}
    lone_is_test = tested and recipe.val_split is None
    return replace(_joined(parts, mode, lone_is_test=lone_is_test), notes=tuple(notes))


def _joined(parts: Mapping[str, Images], mode: str, *, lone_is_test: bool) -> Source:
    """Put parts together; labels of all follow the names of the first.

    Where ``lone_is_test``, a part for validation is for the test if there is none for that.
    """
    splits = {role: split_of(images, mode) for role, images in parts.items()}
    if not splits:
        raise UserError(
            "The data set has none of the splits that are asked for; name them by --set."
        )
    names = next(iter(parts.values())).class_names
    for role, images in parts.items():
        if images.class_names in (names, ()):
            continue
        numbers = match_names(images.class_names, names)
        if strangers := [images.class_names[i] for i in (numbers < 0).nonzero().flatten().tolist()]:
            raise UserError(
                f"The {role} images have classes that the training images lack: "
                f"{', '.join(strangers[:5])}; correct the data set."
            )
        splits[role] = splits[role].renumbered(numbers, len(names))
    train, val, test = (splits.get(role) for role in ROLES)
    if test is None and lone_is_test:
        val, test = None, val
    return Source(train, val, test, names)


def _digits(recipe: Recipe, mode: str) -> Source:
    if recipe.train_split or recipe.val_split or recipe.test_split:
        raise UsageError("The splits of digits are fixed; drop train_split and its like.")
    require_extra("train", "sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), stored as 0 ... 16
    images = PilImages([Image.fromarray(image) for image in pixels], digits.target, "0123456789")
    whole = split_of(images, mode)
    train, test = stratified_split(whole.labels, 1 / 3, "digits/test")
    return Source(whole.subset(train), None, whole.subset(test), images.class_names)


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


def _wanted(recipe: Recipe) -> dict[str, str | None]:
    return {"train": recipe.train_split, "val": recipe.val_split, "test": recipe.test_split}


def _shared_roles(recipe: Recipe, ranges: Mapping[str, Collection[Range]]) -> set[str]:
    """Roles that were only guessed, and whose images another role has: to be left out.

    Raises:
        UsageError: Both roles were named, or images were to be trained on.
    """
    wanted, shared = _wanted(recipe), set()
    for first, second in itertools.combinations(ranges, 2):
        overlap = any(
            a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
            for a, b in itertools.product(ranges[first], ranges[second])
        )
        if overlap:
            drop = next((role for role in (second, first) if wanted[role] is None), "train")
            if drop == "train":
                raise UsageError(
                    f"{first} and {second} would share images; name different ones by "
                    f"{first}_split and {second}_split."
                )
            shared.add(drop)
    return shared


def _find_hub(recipe: Recipe, hub: HubSplits, used: Collection[str]) -> dict[str, HubImages]:
    """Splits of a Hub data set by role."""
    names = {}
    for role, wanted in _wanted(recipe).items():
        usual = next((name for name in ROLES[role] if name in hub.splits), None)
        if name := wanted or usual:
            names[role] = name
    if "train" not in names and "train" in used:
        raise UserError(
            f"{hub.name} has no training split; it has {', '.join(hub.splits)}: name one by --set "
            "train_split=NAME."
        )
    shared = _shared_roles(recipe, {role: hub.ranges(name) for role, name in names.items()})
    return {role: hub.open(name) for role, name in names.items() if role not in shared}


def _find_shards(recipe: Recipe) -> dict[str, Images]:
    """Webdataset shards, which are read by position and not by timm's streams."""
    if recipe.data_dir is None:
        raise UserError(f"{recipe.data} needs --data-dir: the folder that holds the shards.")
    root = Path(recipe.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is no folder; name one that holds shards.")
    found = {}
    for role, wanted in _wanted(recipe).items():
        for split in [wanted] if wanted else ROLES[role]:
            if role not in found and (paths := find_shards(root, split)):
                found[role] = split, paths
        if wanted and role not in found:
            raise UserError(f"{root} has no shards of {wanted!r}; correct the name of the split.")
    if "train" not in found:
        raise UserError(
            f"No training shards in {root}: there is no _info.json and no NAME-train-NUMBER.tar; "
            "correct --data-dir, or add --set train_split='NAME-{0000..0099}.tar'."
        )
    ranges = {role: [(str(path), 0, 1) for path in paths] for role, (_, paths) in found.items()}
    shared = _shared_roles(recipe, ranges)
    return {
        role: open_shards(root, split, paths)
        for role, (split, paths) in found.items()
        if role not in shared
    }


def _find_timm(name: str, recipe: Recipe, mode: str) -> dict[str, Images]:
    """What torchvision and tensorflow-datasets have, as timm opens it."""
    root = recipe.data_dir
    if root is None:
        raise UserError(f"{name} needs --data-dir: the folder that holds or receives it.")
    if not recipe.download and not Path(root).exists():
        raise UserError(f"--data-dir {root} does not exist; correct it.")
    found: dict[str, Any] = {}
    ranges: dict[str, list[Range]] = {}
    wanted = _wanted(recipe)
    for role in ("train", "test", "val"):
        # torchvision's sets know two splits, and timm takes any other name for the second one.
        if role == "val" and "test" in found and name.startswith("torch") and not wanted["val"]:
            continue
        named = wanted[role] or (role if role == "train" else None)
        for split in [named] if named else ROLES[role]:
            try:
                found[role] = _open_timm(name, root, mode, split=split, download=recipe.download)
            except UserError:
                if named:
                    raise
                continue
            ranges[role] = [(str(getattr(found[role], "train", split)), 0, 1)]
            break
    shared = _shared_roles(recipe, {role: ranges[role] for role in ROLES if role in ranges})
    return {role: _adapted(found[role]) for role in ROLES if role in {*found} - shared}


def _open_timm(name: str, root: str, mode: str, **kwargs: Any) -> Any:
    """Open timm's data set, with its many kinds of failure turned into one."""
    try:
        return create_dataset(name, root=root, input_img_mode=mode, **kwargs)
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"Cannot open {name}: {one_line(error)}") from error


class TorchImages(PilImages):
    """A data set of torchvision, which decodes its images itself."""

    def open(self, row: int) -> Image.Image:
        """The picture."""
        row_of_set: Any = self.images[row]
        image: Image.Image = row_of_set[0]
        return image


def _adapted(dataset: Any) -> Images:
    if not isinstance(dataset, IterableDataset):
        # Sets without a list of targets must be read once.
        targets = getattr(dataset, "targets", None)
        return TorchImages(
            dataset,
            targets if targets is not None else (t for _, t in dataset),
            (plain(str(name)) for name in getattr(dataset, "classes", ())),
        )
    # A stream has no positions by which it could be split or shuffled. Its reader cuts it by rank
    # if a process group exists when it is opened; sources are opened before there is one.
    items = [(item[0], int(item[1])) for item in dataset]
    return PilImages([image for image, _ in items], [label for _, label in items])
