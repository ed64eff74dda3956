"""What a folder of images may be: the one description that all commands share.

* ``D/CLASS/picture``: class folders. All images are for training, or for the test where only that
  is asked for.
* ``D/train/CLASS/picture``, with ``val`` and ``test`` where there are some: parts, in any case and
  by any of the names in `ROLES`. A part may be a tar, ``D/train.tar``, and so may D.
* with a label file (`label_file`), or said to have no labels: pictures anywhere below D; those
  below a part's folder are of that part, all others for training.

The class is the first folder, however deep a picture lies. A lone folder around all others, as an
archive leaves it, is looked into. The same folder is never two parts. What is left out is counted.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from timm_xformers.data.classes import shared_words
from timm_xformers.data.label_file import label_files
from timm_xformers.data.notes import Note
from timm_xformers.data.split import Images
from timm_xformers.data.targets import Classes, names_in, to_labels
from timm_xformers.data.trees import LeftOut, Place, Tree, by_nature, read_span
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.text import plain
from timm_xformers.recipe import Recipe

__all__ = ["ROLES", "FileImages", "open_folder"]

# Names of parts, in the order in which they are looked for.
ROLES = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}
ROLE_NAMES = {name for names in ROLES.values() for name in names}
DEEPEST_WRAP = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a folder: its name there, where it is and what lies below."""

    name: str
    place: Place
    tree: Tree


class FileImages(Images):
    """Pictures in files of their own, or in a tar.

    Args:
        place: Where they lie.
        classes: Class of each by name below the place, or tuples of its classes.
        order: Names of the classes by label; empty if there are no labels.
    """

    def __init__(self, place: Place, classes: Mapping[str, Classes], order: Sequence[str]) -> None:
        self.place = place
        self.files = sorted(classes, key=by_nature)
        self.spans = place.members() if place.packed else None
        self.labels = to_labels([classes[file] for file in self.files], order)
        self.class_names = tuple(map(plain, order))

    def open(self, row: int) -> BinaryIO:
        """The file."""
        file = self.files[row]
        if self.spans is None:
            return (self.place.path / file).open("rb")
        return read_span(self.place.path, self.spans[file])

    def name(self, row: int) -> str:
        """Its path."""
        return f"{self.place}/{self.files[row]}"

    def path(self, row: int) -> Path | None:
        """Its path, outside tars."""
        return self.place.path / self.files[row] if self.spans is None else None

    def key(self, row: int) -> str:
        """Its name below the place."""
        return self.files[row]


def open_folder(recipe: Recipe, used: Collection[str]) -> tuple[dict[str, FileImages], list[Note]]:
    """The parts of a folder by role: train, val and test, those that there are.

    Args:
        recipe: Its ``data_dir``, ``labels`` and names of splits.
        used: Roles that will be read. Classes must be those of the training images where these are
            among them, and a folder without parts is the test set where only that is.

    Returns:
        The parts; and lines on the kinds of files, where there are several, and on what was left
        out.

    Raises:
        UserError: It is no such folder.
    """
    root, wanted = _find_root(recipe)
    by_file = recipe.labels is not None and not recipe.unlabelled
    labels = _find_label_file(recipe) if by_file else None
    flat = recipe.labels is not None  # no folder is a class
    places = _find_parts(root, wanted, labelled=flat)
    left_out = LeftOut()
    parts = _read_parts(root, places, used, left_out, flat=flat)
    notes: list[Note] = []
    classes: Mapping[str, Mapping[str, Classes]]
    if labels is not None:
        files = {role: (part.name, part.tree.files) for role, part in parts.items()}
        classes, notes = label_files(labels, files, left_out, several=recipe.multi_label)
    elif recipe.unlabelled:
        classes = {role: dict.fromkeys(_files(part), ()) for role, part in parts.items()}
    else:
        classes = {role: _by_folder(role, part, left_out) for role, part in parts.items()}
    if "train" in used and not classes.get("train"):
        raise UserError(f"{labels} names no image for training below {root}; correct it.")
    order: list[str] = []
    for role, part in parts.items():
        new = sorted(names_in(classes[role].values()) - {*order}, key=by_nature)
        if role != "train" and new and "train" in used:
            raise UserError(
                f"{part.place} has classes that the training images lack: "
                f"{plain(', '.join(new[:5]))}; make the folders agree."
            )
        order += new
    found = {
        role: FileImages(part.place, classes[role], order)
        for role, part in parts.items()
        if classes[role]
    }
    suffixes = Counter(
        os.path.splitext(file)[1].lower() for images in found.values() for file in images.files
    )
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    if len(suffixes) > 1:
        notes.append(Note(f"files: {kinds}", ""))
    if str(left_out):
        notes.append(Note(f"left out: {left_out}", f"left out: {left_out.counts}"))
    if labels is not None and not recipe.multi_label:
        notes += shared_words(order)
    return found, notes


def _find_root(recipe: Recipe) -> tuple[Place, dict[str, str | None]]:
    """The folder, and the parts' names that the recipe wants."""
    if recipe.data_dir is None:
        raise UserError("A folder of images needs --data-dir FOLDER.")
    root = Place(Path(recipe.data_dir))
    if not root.path.exists():
        raise UserError(f"--data-dir {root} does not exist; name a folder (or .tar) of images.")
    wanted = {"train": recipe.train_split, "val": recipe.val_split, "test": recipe.test_split}
    return root if any(wanted.values()) else _unwrapped(root, ROLE_NAMES), wanted


def _find_label_file(recipe: Recipe) -> Path:
    """The label file, from here or from the data folder."""
    given = Path(str(recipe.labels))
    for path in (given, Path(str(recipe.data_dir)) / given):
        if path.is_file():
            return path
    raise UserError(
        f"--labels {plain(str(given))} is no file, neither here nor in {recipe.data_dir}; name a "
        "CSV file of images and their classes."
    )


def _find_parts(
    root: Place, wanted: Mapping[str, str | None], *, labelled: bool
) -> dict[str, tuple[str, Place]]:
    """Names and places of the parts that there are, by role."""
    below = root.below()
    # A folder of pictures alone can be a class that happens to be called so.
    like = [name for name, place in below.items() if labelled or place.below()]
    places: dict[str, tuple[str, Place]] = {}
    for role, usual in ROLES.items():
        name = wanted[role]
        if name is not None:
            place = below.get(name)
            if place is None and not root.packed and (root.path / name).exists():
                place = Place(root.path / name)
            if place is None:
                raise UserError(f"There is no {name!r} in {root}; correct the name of the split.")
            places[role] = name, place
            continue
        for same in ([name for name in like if name.casefold() == word] for word in usual):
            if len(same) > 1:
                raise UserError(f"{root} has both {' and '.join(same)}; rename or move one.")
            if same and role not in places:
                places[role] = same[0], below[same[0]]
    _refuse_overlap(places)
    return places


def _refuse_overlap(places: Mapping[str, tuple[str, Place]]) -> None:
    """An image in two roles would make a figure that means nothing."""
    for role, (_, place) in places.items():
        for other, (_, second) in places.items():
            within = place.path.resolve().is_relative_to(second.path.resolve())
            if role != other and within and place.inside.startswith(second.inside):
                raise UsageError(
                    f"{role} and {other} would share the images in {place}; name different folders."
                )


def _read_parts(
    root: Place,
    places: Mapping[str, tuple[str, Place]],
    used: Collection[str],
    left_out: LeftOut,
    *,
    flat: bool,
) -> dict[str, Part]:
    """Look below each part; what lies in none is the training part if that has no folder.

    Pictures need no class folders where it is ``flat``; ``left_out`` is told what is in no part.
    """
    names = {name for name, _ in places.values()}
    parts = {}
    if "train" not in places:
        rest = root.tree(without=names)
        if places and not any(flat or "/" in file for file in rest.files):
            if "train" in used:
                raise UserError(
                    f"{root} has {' and '.join(sorted(names))} and no part for training; call it "
                    "train, or name it by --set train_split=NAME."
                )
            left_out.add("images beside the parts", rest.files)
        else:
            role = "test" if not places and {*used} == {"test"} else "train"
            parts[role] = Part("", root, rest)
    else:
        left_out.add("folders that are no part with class folders", {*root.below()} - names)
        left_out.add("images beside the parts", root.pictures())
    classes: Collection[str] = ()
    for role in ROLES:
        if role in places:
            name, place = places[role]
            place = _unwrapped(place, classes)
            parts[role] = Part(name, place, place.tree())
        if role in parts:
            classes = classes or parts[role].tree.folders
            left_out.update(parts[role].tree.left_out)
    return parts


def _unwrapped(place: Place, kept: Collection[str]) -> Place:
    """The folder within lone folders that hold nothing but folders and are not to be kept."""
    for _ in range(DEEPEST_WRAP):
        below = place.below()
        if len(below) != 1 or place.pictures():
            break
        ((name, inner),) = below.items()
        if {name, name.casefold()} & {*kept} or not inner.below() or inner.pictures():
            break
        place = inner
    return place


def _files(part: Part, advice: str = "name the folder that holds them") -> Collection[str]:
    """The pictures of a part, of which there must be some."""
    if not part.tree.files:
        raise UserError(
            f"Found 0 images in {part.place}; {advice}. Read are .png, .jpg, .webp, .tif and what "
            "else Pillow opens."
        )
    return part.tree.files


def _by_folder(role: str, part: Part, left_out: LeftOut) -> dict[str, str]:
    """Class of each picture: the first folder of its name."""
    files = _files(part, "put them into a folder for each class")
    classes = {file: file.partition("/")[0] for file in files if "/" in file}
    if not classes or {name.casefold() for name in classes.values()} <= ROLE_NAMES:
        raise UserError(
            f"The images in {part.place} form one class, for there are no class folders; put each "
            "class into a folder of its own, or name a file of their classes by --labels FILE.csv. "
            "Without labels, retrofit and analyse take them by --labels none."
        )
    left_out.add("images beside the class folders", set(files) - set(classes))
    # A class without images has no number; left unsaid, the later classes would be renumbered.
    empty = part.tree.folders - {*classes.values()}
    named = sorted(name for name in empty if not name.startswith((".", "_")))
    if named and role == "train":
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise UserError(
            f"{part.place} has class folders without images (.png, .jpg and what else Pillow "
            f"opens): {plain(', '.join(named[:5]))}{more}; add images or remove the folders."
        )
    return classes
