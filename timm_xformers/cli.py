"""The console command ``timm-xformers``, also ``python -m timm_xformers`` and train_scripts/*.py.

A command is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args)``. None of them
imports torch before it runs, so that help and mistakes answer at once.
"""

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from timm_xformers.errors import UserError
from timm_xformers.training.signals import Stopped

__all__ = ["main"]

COMMANDS = (
    *("train", "evaluate", "select", "report", "models", "predict", "convert", "publish"),
    *("shards", "plan", "benchmark"),
)
# The file system's refusals: the user's to repair, wherever they come up.
REFUSALS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        0, or 1 for a failure, 2 for a wrong use, 130 after an interruption, 143 after SIGTERM.
    """
    parser, modules = _parser()
    args = parser.parse_args(argv)
    try:
        modules[args.command].run(args)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return _fail(f"{error.filename or 'A file'}: {error.strerror}; choose another place.", 1)
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    parser = argparse.ArgumentParser(
        prog="timm-xformers", description="Efficient attention for vision, as timm models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name in COMMANDS:
        module = importlib.import_module(f"timm_xformers.commands.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        modules[name] = module
    return parser, modules


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
