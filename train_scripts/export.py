"""`timm-xformers export` as a file, for clones."""

import sys

from timm_xformers.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
