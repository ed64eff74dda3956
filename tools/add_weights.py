"""Add the best weights of a finished run to the package, with records, card and tables.

    python -m tools.add_weights RUN [--data-dir FOLDER] [--replace]

The tag is MODEL.DATA. The weights are rounded to float16 and tested; a tag that was released is
never changed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_xformers.errors import UserError, require_extra

__all__ = ["main"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="where the data lies; default: where the run had it"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="before the first release: put them in the place of others of the same tag",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Add the weights, and say what became of the accuracy; 1 for a failure, 2 for a wrong use."""
    args = parse(argv)
    try:
        require_extra("train", "accelerate")
        from timm_xformers.publishing.finished_run import open_finished
        from tools.checkout import this_checkout
        from tools.package_weights import add_to_package

        finished = open_finished(Path(args.run))
        entry, record = add_to_package(
            finished, this_checkout(), args.data_dir, replace=args.replace
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    before = finished.record.test_top1_percent
    print(json.dumps(dataclasses.asdict(record), indent=2))
    print(
        f"{entry.name} is in {entry.path} ({entry.bytes:,} bytes): "
        f"{record.test_top1_percent:.2f} % on the test set, {before:.2f} % as trained"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
