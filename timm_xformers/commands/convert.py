"""``timm-xformers convert``: a run's weights as float16."""

import argparse
import dataclasses
import json
from pathlib import Path

from timm_xformers.errors import UsageError, require_extra

HELP = "round a run's best weights to float16, test them and write them to a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--output", metavar="FOLDER", help="new folder for weights, config.json and the record"
    )
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="where the data lies; default: where the run had it"
    )
    parser.add_argument("--to-package", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Convert, and say what became of the accuracy."""
    if args.to_package:
        raise UsageError(
            "--to-package has become a tool of the repository; in a clone, use "
            f"python -m tools.add_weights {args.run}"
        )
    if args.output is None:
        raise UsageError("convert needs --output FOLDER, a new folder for the float16 weights.")
    require_extra("train", "accelerate")
    from timm_xformers.publishing.finished_run import open_finished
    from timm_xformers.publishing.float16 import convert

    finished = open_finished(Path(args.run))
    record = convert(finished, Path(args.output), args.data_dir)
    print(json.dumps(dataclasses.asdict(record), indent=2))
    print(
        f"float16 weights are in {args.output}: {record.percent('test'):.2f} % on the test set, "
        f"{finished.record.percent('test'):.2f} % as trained"
    )
