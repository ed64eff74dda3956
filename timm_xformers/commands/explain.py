"""``timm-xformers explain``: what a model looks at, block by block."""

import argparse
from pathlib import Path
from typing import Any

from timm_xformers.commands.options import MODEL_HELP
from timm_xformers.errors import require_extra

HELP = "draw what a model looks at, block by block, whatever its attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("image", metavar="IMAGE", help="file or http(s) address")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the picture to write, such as maps.png"
    )
    parser.add_argument(
        "--blocks", type=_blocks, metavar="0,5,...", help="blocks, counted from 0; default all"
    )
    parser.add_argument(
        "--query",
        type=_query,
        metavar="class|mean|ROW,COL",
        help="whose output: the class token, the average of all tokens, or one of the grid; "
        "default class, or mean where a model has no class token",
    )
    parser.add_argument(
        "--beside", metavar="MODEL", help="another model above, such as the original of a retrofit"
    )


def run(args: argparse.Namespace) -> None:
    """Draw the picture."""
    require_extra("train", "matplotlib")
    from timm_xformers.explaining.picture import draw_maps, look

    names = [args.model] if args.beside is None else [args.beside, args.model]
    seen: list[Any] = []
    for name in names:
        # The second model shows what the first did: a retrofit has as many blocks.
        blocks = list(seen[0].maps) if seen else args.blocks
        query = seen[0].query if seen else args.query
        seen.append(look(name, args.image, blocks, query))
        guess = seen[-1].guess
        print(f"{name}: {guess.name}, {100 * guess.probability:.2f} %")
    draw_maps(Path(args.output), seen)


def _blocks(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of blocks, such as 0,5,11")
    return sorted({*map(int, words)})


def _query(text: str) -> str | tuple[int, int]:
    if text in ("class", "mean"):
        return text
    words = text.split(",")
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not class, mean or ROW,COL, such as 3,4")
    return int(words[0]), int(words[1])
