"""The console command ``timm-xformers``, also ``python -m timm_xformers`` and train_scripts/*.py.

A command is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args)``. None of them
imports torch before it runs, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from timm_xformers import __version__
from timm_xformers.errors import UserError, nearest
from timm_xformers.recipe import Recipe
from timm_xformers.training.signals import Stopped

__all__ = ["main"]

COMMANDS = (
    *("train", "retrofit", "evaluate", "select", "study", "report", "models", "predict"),
    *("analyse", "explain", "convert", "publish"),
    *("recipe", "export", "shards", "plan", "benchmark", "env"),
)
# The file system's refusals: the user's to repair, wherever they come up.
REFUSALS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
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
        0, or 1 for a failure, 2 for a wrong use, 130 after an interruption, 143 after SIGTERM, 141
        if the reader of the output is gone.
    """
    modules = {n: importlib.import_module(f"timm_xformers.commands.{n}") for n in COMMANDS}
    args = _parse(modules, argv)
    try:
        modules[args.command].run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
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


def _parse(modules: dict[str, ModuleType], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="timm-xformers", description="Efficient attention for vision, as timm models."
    )
    parser.add_argument("--version", action="version", version=f"timm-xformers {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, module in modules.items():
        parsers[name] = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(parsers[name])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(parsers[args.command], unknown, takes_recipe=hasattr(args, "set"))
    return args


def _refuse(parser: argparse.ArgumentParser, unknown: list[str], *, takes_recipe: bool) -> None:
    """End with the way that an unknown flag has, or the nearest flags."""
    flag = unknown[0].partition("=")[0]
    key = flag.lstrip("-").replace("-", "_")
    settings = [field.name for field in dataclasses.fields(Recipe)]
    if takes_recipe and key in settings:
        parser.error(f"unknown flag {flag}; {key} is a setting: --set {key}=VALUE")
    close = nearest(flag, parser._option_string_actions)
    hint = f"; arguments of a model are --set model_kwargs.{key}=VALUE" if takes_recipe else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{close}{hint}")


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
