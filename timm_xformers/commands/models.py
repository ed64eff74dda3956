"""``timm-xformers models``: what there is to choose from, and what it costs."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from timm_xformers.commands.options import positive
from timm_xformers.errors import UsageError
from timm_xformers.files.tables import cell_text, csv_text, markdown_table, text_table

HELP = "list our models with their size, cost and memory, or the mechanisms (--attention)"

SORT = ("name", "params", "gmacs", "memory")
FACTORS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
DEFAULT_BATCH_SIZE = 64

# Heading -> text of an entry.
_Columns = dict[str, Callable[[Any], str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="names, or shell patterns over them"
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="list the mechanisms that attn_layer takes; PATTERN is over their names",
    )
    parser.add_argument("--mechanism", metavar="PATTERN", help="only models with such attention")
    parser.add_argument(
        "--pretrained", action="store_true", default=None, help="only names with weights"
    )
    parser.add_argument(
        "--max-params", type=_count, metavar="N", help="only up to N parameters: 600k, 1.5M, 86000"
    )
    parser.add_argument(
        "--img-size", type=positive, metavar="PIXELS", help="measure at this side of the input"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"images whose activations are measured, default {DEFAULT_BATCH_SIZE}",
    )
    parser.add_argument("--sort", choices=SORT, help="smallest first; default: as asked for")
    parser.add_argument("--format", choices=("table", "markdown", "csv", "json"), default="table")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.attention:
        _list_mechanisms(args)
    else:
        _list_models(args)


def _list_mechanisms(args: argparse.Namespace) -> None:
    flags = ("mechanism", "pretrained", "max_params", "img_size", "batch_size", "sort")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(args, name) is not None]
    if given:
        raise UsageError(
            f"--attention lists mechanisms, not models, so {', '.join(given)} cannot go with it; "
            "use PATTERN and --format only."
        )
    from timm_xformers.planning.catalog import Mechanism, mechanisms

    columns: _Columns = {
        "attention": lambda m: m.name,
        "settings": lambda m: cell_text(m.settings),
        "exact when": lambda m: m.exact_when,
        "masks": lambda m: m.masks,
        "causal": lambda m: "yes" if m.causal else "no",
        "fixed grid": lambda m: "yes" if m.needs_fixed_grid else "no",
    }
    print(_render(Mechanism, mechanisms(args.patterns), columns, args.format))


def _list_models(args: argparse.Namespace) -> None:
    from timm_xformers.planning.catalog import Model, catalog

    batch_size = args.batch_size or DEFAULT_BATCH_SIZE
    try:
        models, refused = catalog(
            args.patterns,
            mechanism=args.mechanism or "*",
            pretrained=bool(args.pretrained),
            max_params=args.max_params or float("inf"),
            img_size=args.img_size,
            batch_size=batch_size,
            on_start=_show_progress,
        )
    finally:
        _show_progress("")
    if args.sort is not None:
        models.sort(key=lambda model: _sort_key(model, args.sort))
    columns: _Columns = {
        "model": lambda m: m.name,
        "attention": lambda m: m.attention,
        "pixels": lambda m: f"{m.img_size}",
        "tokens": lambda m: f"{m.tokens:,}",
        "parameters": lambda m: f"{m.params:,}",
        "GMACs": lambda m: f"{m.gmacs:.3f}" if m.gmacs >= 0.01 else f"{m.gmacs:.1g}",
        f"MiB at batch {batch_size}": lambda m: (
            f"{m.activation_mib:,.{0 if m.activation_mib >= 100 else 1}f}"
        ),
        "weights": lambda m: cell_text(m.weights) or "-",
    }
    for_people = args.format in ("table", "markdown")
    if models or not for_people:
        print(_render(Model, models, columns, args.format))
    if models and refused and for_people:
        print()
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, why in refused.items() if why == reason]
        print(
            f"Not measured: {', '.join(names)}: {reason}",
            file=sys.stdout if for_people else sys.stderr,
        )


def _show_progress(name: str) -> None:
    """Overwrite one line of the terminal, if there is one."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name and 'measuring '}{name}", end="", file=sys.stderr, flush=True)


def _sort_key(model: Any, by: str) -> tuple[float, list[tuple[int, str]]]:
    """Order by a figure, then by name with its numbers as numbers, as timm does."""
    figures = {"params": model.params, "gmacs": model.gmacs, "memory": model.activation_mib}
    parts = re.split(r"(\d+)", model.name)
    return figures.get(by, 0), [(int(p) if p.isdigit() else 0, p) for p in parts]


def _render(kind: Any, entries: Sequence[Any], columns: _Columns, style: str) -> str:
    """Entries of a dataclass as text without a final line break.

    Args:
        kind: The dataclass; its fields are what json and csv give, unrounded.
        entries: In the order to print.
        columns: What table and markdown give.
        style: "table", "markdown", "csv" or "json".
    """
    if style == "json":
        return json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2)
    if style == "csv":
        names = [field.name for field in dataclasses.fields(kind)]
        return csv_text(map(dataclasses.asdict, entries), names).rstrip("\n")
    rows = [[cell(entry) for cell in columns.values()] for entry in entries]
    if style == "markdown":
        rows = [[f"`{row[0]}`", *row[1:]] for row in rows]
        return "\n".join(markdown_table(list(columns), rows))
    return text_table(list(columns), rows)


def _count(text: str) -> float:
    """A number that may end in k, M or G."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([kmg]?)", text.lower())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number above 0; write 86000, 600k or 1.5M"
        )
    return float(match[1]) * FACTORS[match[2]]
