"""``python -m upt_fast``: the command line."""

import sys

from upt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
