"""Names from outside (files, classes, columns) as text that is safe wherever it is shown."""

import unicodedata
from collections.abc import Sequence
from typing import Literal

__all__ = ["one_line", "plain", "some"]

# They turn the direction of what follows, so that a name shows as another one.
DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# Characters with which a spreadsheet's formula begins.
FORMULA = ("=", "+", "-", "@")
MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*[]<>|"})


def plain(text: str, where: Literal["text", "csv", "markdown"] = "text") -> str:
    r"""Text without characters that do something: control, direction and broken ones.

    They are written as escapes such as ``\x1b``, so that different names stay different; a byte of
    a file's name that is no UTF-8 likewise. Everything then encodes as UTF-8, on one line.

    Args:
        text: Any.
        where: ``csv`` also puts ``'`` before what a spreadsheet would take for a formula, unless it
            is a number; ``markdown`` also escapes what Markdown and HTML read as marks.
    """
    text = "".join(map(_shown, text))
    if where == "csv" and text.startswith(FORMULA) and not _is_number(text):
        return f"'{text}"
    return text.translate(MARKDOWN) if where == "markdown" else text


def one_line(error: object) -> str:
    """An error's own words on one line; its kind where it has none."""
    return plain(" ".join(str(error).split())) or type(error).__name__


def some(names: Sequence[object], count: int = 5) -> str:
    """The first of some names, and dots where there are more."""
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "")


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTIONS:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
