"""Lines on what was found in the data and what of it is in no split."""

__all__ = ["Note"]


class Note(str):
    """A line for a person, which may name files and classes, and what of it a record keeps.

    Records are published, so they have numbers and reasons, and nobody's file names.

    Args:
        line: What is said.
        kept: The same without names; empty for what matters to nobody later.
    """

    kept: str

    def __new__(cls, line: str, kept: str) -> "Note":
        """The line, with what is kept of it."""
        note = super().__new__(cls, line)
        note.kept = kept
        return note
