"""`python -m fedmezo` is the command `fedmezo`."""

import sys

from fedmezo.cli import main

if __name__ == "__main__":
    sys.exit(main())
