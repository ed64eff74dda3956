"""Tables as text: Markdown, CSV, and columns for a terminal."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from timm_xformers.files.atomic import write_text
from timm_xformers.files.text import plain

__all__ = [
    "cell_text",
    "column_table",
    "csv_text",
    "figure",
    "markdown_table",
    "text_table",
    "write_csv",
]

T = TypeVar("T")


def cell_text(value: Any) -> str:
    """One cell of text: mappings without brackets, lists without commas, nothing for None."""
    if isinstance(value, dict):
        return " ".join(f"{name}={cell_text(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(cell_text, value))
    return "" if value is None else plain(str(value))


def figure(value: float | None, digits: int) -> str:
    """A number with commas between thousands; nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def column_table(
    columns: Mapping[str, Callable[[T], Any]], rows: Sequence[T], align: str
) -> list[str]:
    """Lines of a Markdown table with a column for each function of a row.

    A column that is empty in every row is left out; elsewhere an empty cell is a dash. Spaces at
    the end of a heading tell it from another that is called the same.

    Args:
        columns: Cells by heading.
        rows: What the functions take.
        align: As of `markdown_table`, for all columns.
    """
    sides = align.ljust(len(columns), align[-1])
    shown = [
        (head.strip(), side, cells)
        for (head, cell), side in zip(columns.items(), sides, strict=True)
        if any(cells := [cell_text(cell(row)) for row in rows])
    ]
    heads, kept, columns_of_cells = zip(*shown, strict=True)
    lines = [[text or "-" for text in row] for row in zip(*columns_of_cells, strict=True)]
    return markdown_table(heads, lines, "".join(kept))


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], align: str | None = None
) -> list[str]:
    """Lines of a table.

    Args:
        heads: One per column.
        rows: Cells, one per column, which may hold Markdown; bars are escaped here.
        align: ``l`` (left) or ``r`` (right) for each column, the last letter for all others too;
            None: right where every cell begins with a digit.
    """
    cells = [[cell_text(cell).replace("|", r"\|") for cell in row] for row in rows]
    if align is None:
        align = _sides(cells)
    align = align.ljust(len(heads), align[-1:] or "l")
    rule = ["---:" if side == "r" else "---" for side in align[: len(heads)]]
    return [f"| {' | '.join(row)} |" for row in ([*heads], rule, *cells)]


def text_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns for a terminal, those whose cells all begin with a digit flush right."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    sides = _sides(cells)
    lines = [[*heads], *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides.ljust(len(row), "l"), strict=True)
        ).rstrip()
        for row in lines
    )


def csv_text(rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None) -> str:
    """Rows as CSV; an empty cell is what is not known.

    Args:
        rows: Values by column. Numbers are written in full.
        names: The columns; None: those of the first row.
    """
    rows = list(rows)
    names = list(rows[0] if names is None and rows else names or ())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if names:
        writer.writerow(names)
    writer.writerows([_csv_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def write_csv(
    path: Path, rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None
) -> None:
    """Replace a file by `csv_text`."""
    write_text(path, csv_text(rows, names))


def _sides(cells: Sequence[Sequence[str]]) -> str:
    columns = zip(*cells, strict=True)
    return "".join("r" if all(c[:1].isdigit() for c in column) else "l" for column in columns)


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, (int, float)):
        return value
    return plain(cell_text(value), "csv")
