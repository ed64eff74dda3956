"""Failures that a user can repair: one sentence, no traceback.

Messages say what came, what is allowed and what to do. `timm_xformers.cli.main` prints them and
exits with their code.
"""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["DivergedError", "UsageError", "UserError", "nearest", "require_extra"]


class UserError(ValueError):
    """The run cannot go on, for a reason outside the code: data, files, numbers that diverged."""

    exit_code = 1


class DivergedError(UserError):
    """The loss is NaN or infinite: a verdict on the settings, not on the machine."""


class UsageError(UserError):
    """The command or the recipe asks for something that does not exist or does not fit."""

    exit_code = 2


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Words for an error message: " (nearest: a, b)", or nothing if no known name is close."""
    matches = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(matches)})" if matches else ""


def require_extra(extra: str, *modules: str) -> None:
    """Fail with the install line if an optional dependency is missing.

    Args:
        extra: Name of the extra that brings the modules.
        modules: Top-level import names.

    Raises:
        UserError: At least one of them is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"This needs {', '.join(missing)}, not installed here; run: "
            f'pip install "timm-xformers[{extra}]"'
        )
