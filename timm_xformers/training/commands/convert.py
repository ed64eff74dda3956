"""``timm-xformers convert``: a run's weights as float16, for a folder or for the package."""

import argparse
import dataclasses
import json
from pathlib import Path

from timm_xformers.training.errors import UsageError, require_extra

__all__ = ["HELP", "add_arguments", "run"]

HELP = "round a run's best weights to float16, test them and write a folder or a packaged tag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--output", metavar="FOLDER", help="new folder for weights, config.json and the record"
    )
    target.add_argument(
        "--to-package",
        action="store_true",
        help="add MODEL.DATA to the weights of this checkout, with records, card and table",
    )
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="where the data lies; default: where the run had it"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="with --to-package, before the first release: put them in the place of others",
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and say what became of the accuracy."""
    require_extra("train", "accelerate")
    if args.replace and not args.to_package:
        raise UsageError("--replace is for --to-package; a folder must be new, so drop it.")
    from timm_xformers.training.publishing.finished import open_finished

    finished = open_finished(Path(args.run))
    if args.to_package:
        from timm_xformers.training.publishing.checkout import this_checkout
        from timm_xformers.training.publishing.package import add_to_package

        entry, record = add_to_package(
            finished, this_checkout(), args.data_dir, replace=args.replace
        )
        place = f"{entry.name} is in {entry.path} ({entry.bytes:,} bytes)"
    else:
        from timm_xformers.training.publishing.half import convert

        record = convert(finished, Path(args.output), args.data_dir)
        place = f"float16 weights are in {args.output}"
    before = finished.record.test_top1_percent
    print(json.dumps(dataclasses.asdict(record), indent=2))
    print(f"{place}: {record.test_top1_percent:.2f} % on the test set, {before:.2f} % as trained")
