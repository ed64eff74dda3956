"""``timm-xformers predict``: what a model takes pictures for."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from timm_xformers.commands.options import MODEL_HELP, positive
from timm_xformers.errors import UserError, require_extra

HELP = "classify pictures with any of timm's trained models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="file, folder or http(s) address"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="N",
        help="default 5, or all classes of a multi-label model, each with yes from 50 percent on",
    )
    parser.add_argument(
        "--grid", metavar="FILE", help="also draw the pictures with their classes, up to 64"
    )


def run(args: argparse.Namespace) -> None:
    """Print what each picture is taken for; those that cannot be read come last."""
    if args.grid is not None:
        require_extra("train", "matplotlib")
    from timm_xformers.predicting.images import find_images
    from timm_xformers.predicting.predict import Prediction, predict

    images = find_images(args.images)
    readable: list[Prediction] = []
    unreadable = []
    for entry in predict(args.model, images, args.top_k):
        if not isinstance(entry, Prediction):
            unreadable.append(f"{entry.image} {entry.reason}")
            continue
        readable.append(entry)
        if not args.json:
            print(_lines(entry), flush=True)
    if args.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in readable], indent=2))
    if args.grid is not None and readable:
        from timm_xformers.predicting.grid import draw_grid

        draw_grid(Path(args.grid), readable)
    if unreadable:
        raise UserError(
            f"Cannot read {len(unreadable)} of {len(images)} images: {'; '.join(unreadable)}."
        )


def _lines(prediction: Any) -> str:
    said = {None: "", True: "yes  ", False: "no   "}
    rows = [
        f"{100 * guess.probability:>8.2f} %  {said[getattr(guess, 'present', None)]}{guess.name}"
        for guess in prediction.classes
    ]
    return "\n".join([prediction.image, *rows])
