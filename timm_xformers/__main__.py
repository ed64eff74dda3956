"""``python -m timm_xformers``."""

import sys

from timm_xformers.cli import main

if __name__ == "__main__":
    sys.exit(main())
