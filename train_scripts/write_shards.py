"""`timm-xformers shards` as a file, for clones, `torchrun` and `accelerate launch`."""

import sys

from timm_xformers.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
