"""`python -m hal`."""

import sys

from hal.cli import main

if __name__ == "__main__":
    sys.exit(main())
