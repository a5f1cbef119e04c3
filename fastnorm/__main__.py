"""Entry point of `python -m fastnorm`; the commands are in fastnorm.cli."""

import sys

from fastnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
