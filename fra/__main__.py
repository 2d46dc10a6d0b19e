"""`python -m fra`: the command `fra`."""

import sys

from fra.commands.app import main

if __name__ == "__main__":
    sys.exit(main())
