"""``timm-xformers report``: finished runs side by side."""

import argparse
import sys
from pathlib import Path

from timm_xformers.errors import require_extra

HELP = "compare finished runs: a table over seeds, CSV files and plots"

SORT = ("accuracy", "params", "seconds", "memory", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, folder that holds run folders, or .json or .jsonl file of records",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="report", help="folder to write to; default report"
    )
    parser.add_argument(
        "--sort", choices=SORT, default="accuracy", help="best or least first; default accuracy"
    )
    parser.add_argument(
        "--metric", choices=("test", "val"), default="test", help="accuracy to sort and draw by"
    )


def run(args: argparse.Namespace) -> None:
    """Compare, and say where the report is."""
    require_extra("train", "accelerate", "matplotlib", "scipy")
    from timm_xformers.studies.comparing.report import count_runs, report

    done = report(
        [Path(name) for name in args.runs],
        Path(args.output),
        sort=args.sort,
        metric=args.metric,
    )
    for entry in done.skipped:
        print(f"left out: {entry.source} {entry.reason}", file=sys.stderr)
    are = "is" if sum(len(group.runs) for group in done.groups) == 1 else "are"
    print(f"{count_runs(done.groups)} {are} compared in {done.path}")
