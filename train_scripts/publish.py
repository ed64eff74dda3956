"""`timm-xformers publish` as a file, for clones."""

import sys

from timm_xformers.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
