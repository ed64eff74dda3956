"""`timm-xformers convert` as a file, for clones."""

import sys

from timm_xformers.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
