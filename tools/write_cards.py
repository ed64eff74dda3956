"""Write model_cards/ and the tables of the README and docs/ anew, from the records."""

import sys

from tools.checkout import this_checkout
from tools.generated_files import stale_files, write_generated


def main() -> int:
    """Write what is stale, and say what that was."""
    checkout = this_checkout()
    stale = stale_files(checkout)
    write_generated(checkout)
    print("\n".join(stale) or "nothing was stale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
