"""``timm-xformers study``: models x data sets x seeds under one recipe, trained and compared."""

import argparse
import sys
from pathlib import Path

from timm_xformers.commands.options import positive
from timm_xformers.errors import UsageError, UserError, require_extra

HELP = "compare models over seeds under one recipe: train a matrix of runs, then make its page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "file", metavar="FILE", help="YAML with recipe, data, seeds, baseline and arms"
    )
    parser.add_argument(
        "--data-dir",
        action="append",
        default=[],
        metavar="FOLDER|DATA=FOLDER",
        help="where the data lies; with several data sets once for each, by its name",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder to create, to go on in, or to help in; default runs/study-FILE",
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="runs at once")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of each run; default: the cores, shared out"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the runs will take, measured on a few steps of every arm, and end",
    )
    what.add_argument(
        "--costs",
        action="store_true",
        help="measure speed, memory and operations of the arms side by side, on a quiet machine",
    )
    what.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="PAGE.md",
        help="write the page, table and plots from the records alone; default study.md in the "
        "folder",
    )


def run(args: argparse.Namespace) -> None:
    """Train what is missing, and say what came of it."""
    require_extra("train", "accelerate", "filelock", "matplotlib", "scipy", "tqdm")
    from timm_xformers.studies.running.definition import load_study

    path = Path(args.file)
    study = load_study(path)
    root = Path(args.output or f"runs/study-{path.stem}")
    data_dirs = _data_dirs(args.data_dir, study.data)
    if args.report is not None:
        from timm_xformers.studies.running.page import write_page

        page = Path(args.report) if args.report else root / "study.md"
        for words in write_page(study, root, page):
            print(f"left out: {words}", file=sys.stderr)
        print(f"The page is {page}, its table and plots are in {page.with_suffix('')}")
        return
    if args.costs:
        from timm_xformers.studies.running.costs import measure_costs

        written, notes = measure_costs(study, root, args.threads or 1)
        for words in notes:
            print(f"note: {words}", file=sys.stderr)
        print(f"The costs of {len(study.arms)} arms are in {written}")
        return
    from timm_xformers.studies.running.matrix import plan_study, run_study
    from timm_xformers.studies.shared_folder import threads_for

    threads = args.threads or threads_for(args.workers)
    if args.dry_run:
        plan_study(study, root, data_dirs, threads)
        return
    failed = run_study(study, root, data_dirs, workers=args.workers, threads=threads)
    if failed:
        words = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(study.runs)} runs failed, and the same command tries them "
            f"again: {words}"
        )
    print(f"All {len(study.runs)} runs are finished; their records are in {root / 'records'}")


def _data_dirs(given: list[str], sets: list[str]) -> dict[str, str | None]:
    """Folder by data set."""
    found: dict[str, str | None] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if equals and name in sets:
            found[name] = folder
        elif len(sets) == 1:
            found[sets[0]] = text
        else:
            raise UsageError(
                f"--data-dir {text} does not say whose folder it is; write NAME=FOLDER, with one "
                f"of {', '.join(sets)}."
            )
    return found
