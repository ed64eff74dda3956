"""``timm-xformers publish``: a run folder as a model repository on the Hub."""

import argparse
from pathlib import Path

from timm_xformers.errors import require_extra

HELP = "put a finished run on the Hugging Face Hub: weights, card, curves, record"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("repository", metavar="OWNER/NAME", help="created if it does not exist")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="a new repository is its owner's alone; an existing one stays as it is",
    )
    parser.add_argument(
        "--license",
        default="apache-2.0",
        metavar="ID",
        help="of the weights, as the Hub calls it, such as mit or other; default %(default)s",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the card, and send nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Publish. The token is the client's: HF_TOKEN, or what `hf auth login` keeps."""
    require_extra("train", "accelerate")
    from timm_xformers.publishing.publish import publish

    publish(
        Path(args.run),
        args.repository,
        private=args.private,
        dry_run=args.dry_run,
        license=args.license,
    )
