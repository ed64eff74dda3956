"""Labels from a CSV file, as competitions hand them out: ``id,label``, one picture a line.

Or ``id,cat,dog``, a column for each class, with a 1 in the picture's own and 0 in the others.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_xformers.data.classes import ONE_CLASS_EACH, refuse_lists
from timm_xformers.data.trees import is_picture
from timm_xformers.errors import UserError
from timm_xformers.files.text import plain

__all__ = ["label_files"]

# Column titles of a table with more than two columns, in the order of preference.
IMAGE_TITLES = ("id", "image_id", "image", "img", "file_name", "filename", "file", "path", "name")
LABEL_TITLES = ("label", "labels", "class", "class_name", "category", "target", "breed", "species")
SHOWN = 3


def label_files(
    path: Path, parts: Mapping[str, tuple[str, Sequence[str]]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Give each picture that a label file names its class.

    A line names a picture by its path, from the data folder or from the part's, or by its file's
    name, with or without the suffix; where a name occurs in two parts it means that for training. A
    first line that names no picture is taken for titles.

    Args:
        path: The CSV file, with commas, semicolons or tabs.
        parts: For each role the part's folder, empty for the data folder itself, and the pictures
            below it.

    Returns:
        For each role the class of each picture; and the pictures that are not named.

    Raises:
        UserError: A line is incomplete, contradicts another or names no picture, or more than one.
    """
    rows = _read(path)
    tables = _tables(parts)
    first = rows[0][0]
    titles = [] if _find(first, tables) or is_picture(first) else [c.strip() for c in rows.pop(0)]
    image, label = _columns(path, titles, rows)
    if label is None:
        rows = [
            [row[image], _marked(path, row, image, titles)] if len(row) > image else []
            for row in rows
        ]
        image, label = 0, 1
    classes: dict[str, dict[str, str]] = {role: {} for role in parts}
    missing = []
    for number, row in enumerate(rows, 2 if titles else 1):
        if len(row) <= max(image, label) or not row[label].strip():
            raise UserError(f"{path}, entry {number} has no class; add it or remove the line.")
        found = _find(row[image], tables)
        if not found:
            missing.append(row[image])
            continue
        role = found[0][0]
        found = [entry for entry in found if entry[0] == role]
        if len(found) > 1:
            files = " and ".join(file for _, file in found[:2])
            raise UserError(
                f"{path}, entry {number}: {plain(row[image])} can be {plain(files)}; write paths."
            )
        file, name = found[0][1], row[label].strip()
        if classes[role].setdefault(file, name) != name:
            raise UserError(
                f"{path} calls {plain(file)} {plain(classes[role][file])} and {plain(name)}; keep "
                f"one line for each image ({ONE_CLASS_EACH})."
            )
    if missing:
        raise UserError(
            f"{path} names {len(missing)} images that are not in the folder, such as "
            f"{plain(', '.join(missing[:SHOWN]))}; correct --data-dir or the file."
        )
    refuse_lists(str(path), {name for named in classes.values() for name in named.values()})
    others = [
        file for role, (_, files) in parts.items() for file in files if file not in classes[role]
    ]
    return classes, others


def _read(path: Path) -> list[list[str]]:
    """Rows with a word in them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text[: text.find("\n")] if "\n" in text else text
        mark = max(",;\t", key=head.count)
        found = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark) if any(row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}; save it as one.") from error
    if not found or len(found[0]) < 2:
        raise UserError(f"{path} has no two columns; write lines of image,class.")
    return found


Table = dict[str, list[tuple[str, str]]]


def _tables(parts: Mapping[str, tuple[str, Sequence[str]]]) -> list[Table]:
    """Pictures by each way to call them, the most exact way first."""
    tables: list[Table] = [{}, {}, {}, {}]
    for role, (folder, files) in parts.items():
        for file in files:
            for path in {file, f"{folder}/{file}" if folder else file}:
                tables[0].setdefault(path, []).append((role, file))
                tables[1].setdefault(os.path.splitext(path)[0], []).append((role, file))
            name = file.rpartition("/")[2]
            tables[2].setdefault(name, []).append((role, file))
            tables[3].setdefault(os.path.splitext(name)[0], []).append((role, file))
    return tables


def _find(text: str, tables: Sequence[Table]) -> list[tuple[str, str]]:
    name = text.strip().replace("\\", "/").removeprefix("./")
    return next((table[name] for table in tables if name in table), [])


def _columns(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[int, int | None]:
    """Which column names the picture, and which the class; None: there is one for each class."""
    width = max(len(titles), len(rows[0]) if rows else 0)
    lower = [title.lower() for title in titles]
    image = next((lower.index(title) for title in IMAGE_TITLES if title in lower), 0)
    label = next((lower.index(title) for title in LABEL_TITLES if title in lower), None)
    if label is None and width == 2:
        label = 1 - image
    others = [cell for row in rows for i, cell in enumerate(row) if i != image]
    if label is None and titles and all(_mark(cell) is not None for cell in others):
        return image, None
    if label is None or label == image:
        named = f" ({plain(', '.join(titles))})" if titles else ""
        raise UserError(
            f"{path} has {width} columns{named}, and it is open which has the "
            "classes; keep two, or call one label."
        )
    return image, label


def _mark(cell: str) -> bool | None:
    """What a cell of a class's own column says; None if it is no such cell."""
    return {"1": True, "1.0": True, "0": False, "0.0": False}.get(cell.strip())


def _marked(path: Path, row: Sequence[str], image: int, titles: Sequence[str]) -> str:
    """The class whose column has a 1."""
    found = [
        title for i, title in enumerate(titles) if i != image and _mark("".join(row[i : i + 1]))
    ]
    if len(found) != 1:
        several = f"the classes {plain(', '.join(found))}" if found else "no class"
        raise UserError(f"{path} gives {plain(row[image])} {several}: {ONE_CLASS_EACH}.")
    return found[0]
