"""`python -m fra.explorer TARGET --text "..." [--layer L | --heads L1H4,...] -o FILE.html`."""

import sys

from fra.explorer.command import main

sys.exit(main())
