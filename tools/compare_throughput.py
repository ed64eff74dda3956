"""Compare the speed of `timm-xformers train` with timm's own train.py, on the CPU.

Measures images per second of whole epochs after the first, in pairs of processes with the same
model, batch, threads, workers and image files, in shuffled order over several rounds. The cases
(tools/throughput_cases.py): the same work limited by computing and by
loading, and small data held in memory against timm's loader. train.py stays unmodified and runs
in the faster of its two loader settings. Nothing else should run on the machine.

    python -m tools.compare_throughput --train-py pytorch-image-models/train.py \
        --data-dir data/cifar10 --output throughput

Take train.py from timm's repository, at the tag of the installed timm. The output folder receives
throughput.md, throughput.json and the processes' logs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_xformers.errors import UserError, require_extra
from tools.throughput_cases import CASES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-py", type=Path, required=True, metavar="PATH")
    parser.add_argument("--data", default="cifar10", help="a name as for train; default cifar10")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where it lies")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rounds", type=_count, default=3, metavar="N", help="default 3")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--steps", type=_count, metavar="N", help="batches of an epoch, to try it")
    parser.add_argument(
        "--threads", type=_count, default=os.cpu_count(), metavar="N", help="default: all cores"
    )
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="default 2")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; use 1 or more")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print the table; 1 for a failure, 2 for a wrong use."""
    args = parse(argv)
    try:
        require_extra("train", "accelerate", "matplotlib", "tqdm")
        from tools.throughput import Comparison

        print(Comparison(**vars(args)).run().read_text(encoding="utf-8"), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
