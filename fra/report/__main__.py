"""`python -m fra.report LEDGER.json -o FILE.html`."""

import sys

from fra.report.page import main

sys.exit(main())
