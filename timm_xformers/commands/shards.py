"""``timm-xformers shards``: write a data set as webdataset shards."""

import argparse
from pathlib import Path

from timm_xformers.errors import require_extra

HELP = "write a data set as webdataset shards, for --data wds/NAME"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument(
        "--data", default="folder", help="as for train; default folder, a folder of images"
    )
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the data lies")
    parser.add_argument("--labels", metavar="FILE|COLUMN", help="as for train")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="new folder for shards")
    parser.add_argument(
        "--images-per-shard",
        type=int,
        default=1250,
        metavar="N",
        help="default 1250, some 140 MB of ImageNet",
    )


def run(args: argparse.Namespace) -> None:
    """Write, and say what."""
    require_extra("train", "numpy", "yaml")
    from timm_xformers.data.shard_writer import write_shards
    from timm_xformers.recipe import Recipe

    folder = Path(args.output)
    recipe = Recipe(data=args.data, data_dir=args.data_dir, labels=args.labels)
    written = write_shards(recipe, folder, args.images_per_shard)
    for name, lengths in written.items():
        print(f"{name}: {sum(lengths)} images in {len(lengths)} shards")
    print(f"Train on them by: --data wds/{folder.resolve().name} --data-dir {folder}")
