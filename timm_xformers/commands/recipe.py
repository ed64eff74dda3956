"""``timm-xformers recipe``: the shipped recipes, and what every setting means."""

import argparse
import dataclasses
import textwrap
import typing

from timm_xformers.errors import UsageError, nearest
from timm_xformers.files.yaml_text import dump_yaml
from timm_xformers.recipe import Recipe, allowed, load_recipe, shipped_recipes

HELP = "list recipes, or explain a recipe or a setting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME|FILE|KEY",
        help="a recipe, printed with all its settings and their meaning, or one setting; without "
        "it, the shipped recipes and the names of all settings",
    )


def run(args: argparse.Namespace) -> None:
    """Print recipes, a recipe, or a setting."""
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    shipped = shipped_recipes()
    if args.name is None:
        print("Recipes (train --recipe NAME; recipe NAME explains one):")
        for name, path in shipped.items():
            about = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
            print(f"  {name:26}{about}")
        print("\nSettings (train --set KEY=VALUE; recipe KEY explains one):")
        print(textwrap.fill(", ".join(fields), 98, initial_indent="  ", subsequent_indent="  "))
    elif args.name in fields:
        print(f"{_comment(fields[args.name])}\n{_line(fields[args.name], Recipe())}", end="")
    elif args.name in shipped or "." in args.name or "/" in args.name:
        recipe = load_recipe(args.name, {})
        print("\n".join(f"{_comment(f)}\n{_line(f, recipe)}" for f in fields.values()), end="")
    else:
        close = nearest(args.name, [*shipped, *fields])
        raise UsageError(
            f"{args.name!r} is neither a recipe nor a setting{close}; `timm-xformers recipe` lists "
            "both."
        )


def _comment(field: "dataclasses.Field[typing.Any]") -> str:
    text = f"{field.metadata['meaning']} Takes {allowed(field)}."
    if field.default is not dataclasses.MISSING:
        text += f" Default: {dump_yaml({'x': field.default})[3:].strip()}."
    return textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# ")


def _line(field: "dataclasses.Field[typing.Any]", recipe: Recipe) -> str:
    return dump_yaml({field.name: getattr(recipe, field.name)})
