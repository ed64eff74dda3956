"""Labels from a CSV file, as competitions hand them out: ``id,label``, one picture a line.

Or ``id,cat,dog``, a column for each class, with a 1 in the picture's own and 0 in the others. Where
several classes a picture were asked for, a line may have any number of 1, and a label is a list:
``cat|dog``, with bars, semicolons or commas, or ``cat dog`` in a file that has none of these.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_xformers.data.classes import ONE_CLASS_EACH, refuse_lists
from timm_xformers.data.notes import Note
from timm_xformers.data.targets import Classes, names_in
from timm_xformers.data.trees import LeftOut, by_nature, is_picture
from timm_xformers.errors import UserError
from timm_xformers.files.text import plain, some

__all__ = ["label_files"]

# Column titles of a table with more than two columns, in the order of preference.
IMAGE_TITLES = ("id", "image_id", "image", "img", "file_name", "filename", "file", "path", "name")
LABEL_TITLES = ("label", "labels", "class", "class_name", "category", "target", "breed", "species")
SHOWN = 3
# Between the classes of one picture, if not spaces.
SEPARATORS = {"|": "bars", ";": "semicolons", ",": "commas"}


def label_files(
    path: Path,
    parts: Mapping[str, tuple[str, Sequence[str]]],
    left_out: LeftOut,
    *,
    several: bool = False,
) -> tuple[dict[str, dict[str, Classes]], list[Note]]:
    """Give each picture that a label file names its class.

    A line names a picture by its path, from the data folder or from the part's, or by its file's
    name, with or without the suffix; where a name occurs in two parts it means that for training. A
    first line that names no picture is taken for titles.

    Args:
        path: The CSV file, with commas, semicolons or tabs.
        parts: For each role the part's folder, empty for the data folder itself, and the pictures
            below it.
        left_out: Told of pictures that are not named, and of columns that no picture has a 1 in.
        several: Pictures may have several classes, or none.

    Returns:
        For each role the class of each picture, or a tuple of its classes; and a line on how
        several classes were read, if they were.

    Raises:
        UserError: A line is incomplete, contradicts another or names no picture, or more than one.
    """
    rows = _read(path)
    tables = _tables(parts)
    first = rows[0][0]
    titles = [] if _find(first, tables) or is_picture(first) else [c.strip() for c in rows.pop(0)]
    image, label = _columns(path, titles, rows)
    entries, form = _entries(path, titles, rows, image, label, several=several)
    classes: dict[str, dict[str, Classes]] = {role: {} for role in parts}
    missing = []
    for number, (picture, name) in enumerate(entries, 2 if titles else 1):
        if not picture or name == "":
            raise UserError(f"{path}, entry {number} has no class; add it or remove the line.")
        found = _find(picture, tables)
        if not found:
            missing.append(picture)
            continue
        role = found[0][0]
        found = [entry for entry in found if entry[0] == role]
        if len(found) > 1:
            files = " and ".join(file for _, file in found[:2])
            raise UserError(
                f"{path}, entry {number}: {plain(picture)} can be {plain(files)}; write paths."
            )
        file = found[0][1]
        if (before := classes[role].setdefault(file, name)) != name:
            said = " and ".join(e if isinstance(e, str) else "|".join(e) for e in (before, name))
            why = "" if several else f" ({ONE_CLASS_EACH})"
            raise UserError(
                f"{path} calls {plain(file)} {plain(said)}; keep one line for each image{why}."
            )
    if missing:
        raise UserError(
            f"{path} names {len(missing)} images that are not in the folder, such as "
            f"{plain(', '.join(missing[:SHOWN]))}; correct --data-dir or the file."
        )
    named = [name for files in classes.values() for name in files.values()]
    names = names_in(named)
    if not several:
        refuse_lists(str(path), names)
    if label is None:
        empty = {title for i, title in enumerate(titles) if i != image} - names
        left_out.add(f"columns of {path.name} without a 1", empty)
    others = [
        file for role, (_, files) in parts.items() for file in files if file not in classes[role]
    ]
    left_out.add(f"images that {path.name} does not name", others)
    return classes, [_described(named, form)] if several else []


def _entries(
    path: Path,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    image: int,
    label: int | None,
    *,
    several: bool,
) -> tuple[list[tuple[str, Classes]], str]:
    """Picture and class of each row, or tuple of classes, and in words how these were found."""
    pictures = [row[image] if len(row) > image else "" for row in rows]
    found: list[Classes]
    if several or label is not None:
        _refuse_uneven(path, titles, rows, whole=label is None)
    if label is None:
        form = "columns of 0 and 1"
        marked = [_marked(row, image, titles) for row in rows]
        pairs = zip(pictures, marked, strict=True)
        found = [*marked] if several else [_only(path, *pair) for pair in pairs]
    elif several:
        texts = [row[label].strip() if len(row) > label else None for row in rows]
        mark = _separator(path, [text or "" for text in texts])
        form = f"a column with {SEPARATORS.get(mark or '', 'spaces')} between names"
        found = ["" if text is None else _parts(text, mark) for text in texts]
    else:
        form = ""
        found = [row[label].strip() if len(row) > label else "" for row in rows]
    return list(zip(pictures, found, strict=True)), form


def _refuse_uneven(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool
) -> None:
    """A list without quotation marks, ``0001,cat,dog``, would lose all but its first class.

    Args:
        path: For the message.
        titles: Of the columns, where there are some.
        rows: All others.
        whole: Whether shorter rows are wrong as well.
    """
    width = len(titles or rows[0])
    for number, row in enumerate(rows, 2 if titles else 1):
        if any(row[width:]) or (whole and len(row) < width):
            raise UserError(
                f"{path}, entry {number} has {len(row)} columns and the first line {width}; "
                "correct it, or put quotation marks around a text with the mark between columns."
            )


def _separator(path: Path, texts: Sequence[str]) -> str | None:
    """What stands between the names of a picture's classes; None: spaces."""
    if odd := next((text for text in texts if text[:1] in ("[", "{", "(")), None):
        raise UserError(f"{path} has the label {plain(odd[:60])}; write the classes as cat|dog.")
    used = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
    if len(used) > 1:
        raise UserError(
            f"{path} has {' and '.join(SEPARATORS[mark] for mark in used)} between classes; use "
            "one of them throughout."
        )
    return used[0] if used else None


def _parts(text: str, mark: str | None) -> tuple[str, ...]:
    """The names in a text, each once and in order."""
    return tuple(sorted({part.strip() for part in text.split(mark)} - {""}))


def _described(found: Sequence[Classes], form: str) -> Note:
    """A line on what several classes a picture were taken to be."""
    names = sorted(names_in(found), key=by_nature)
    counts = [len(each) for each in found]
    empty = counts.count(0)
    none = f", {empty} picture{'' if empty == 1 else 's'} with none" if empty else ""
    start = f"several classes a picture, from {form}: {len(names)} classes"
    end = f"{sum(counts) / max(len(counts), 1):.2f} a picture, {max(counts, default=0)} at most"
    return Note(f"{start} ({plain(some(names))}), {end}{none}", f"{start}, {end}{none}")


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
        own = [title for i, title in enumerate(titles) if i != image]
        if "" in own or len({*own}) < len(own):
            raise UserError(
                f"{path} has columns without a name, or two of one name; give each class its own."
            )
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


def _marked(row: Sequence[str], image: int, titles: Sequence[str]) -> tuple[str, ...]:
    """The classes whose columns have a 1."""
    return tuple(
        title for i, title in enumerate(titles) if i != image and _mark("".join(row[i : i + 1]))
    )


def _only(path: Path, picture: str, found: Sequence[str]) -> str:
    if len(found) != 1:
        several = f"the classes {plain(', '.join(found))}" if found else "no class"
        raise UserError(f"{path} gives {plain(picture)} {several}: {ONE_CLASS_EACH}.")
    return found[0]
