"""`fra push OWNER/NAME LEDGER.json...`: ledgers and their reports as a data set on the Hugging Face hub.

`fra compare hub:OWNER/NAME` reads them there. A ledger's name in the data set is that of its target and the beginning
of its sha256: pushed again it is the same file, and another run stands beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fra.checkpoints.shared import check_name, put, yaml_front
from fra.errors import FraError
from fra.report.page import render
from fra.verdicts import ledger as ledgers

_CARD = """
# Verdicts on attention heads

Ledgers of `fra`: claims about attention heads, resolved into features of sparse
autoencoders, as tests with verdicts. `ledgers/` holds them whole, `reports/` a page of each, `rows/` their rows as a
table. `fra compare hub:{name}` shows them side by side.
"""


def run(name: str, paths: Sequence[Path], *, private: bool = False) -> None:
    """Pushes ledgers, their reports and their rows in one commit, and says where it is.

    Raises FraError for what is no ledger or OWNER/NAME, and where the hub refuses; CannotLoad where it is not reached.
    """
    check_name(name)
    if not paths:
        raise FraError("there is no ledger to push: name the files that `pytest claims/ --ledger` has written")
    files: dict[str, bytes] = {}
    for path in paths:
        ledger = ledgers.read(path)
        content = ledgers.dumps(ledger).encode()
        stem = f"{ledger.header.target}-{hashlib.sha256(content).hexdigest()[:12]}"
        files[f"ledgers/{stem}.json"] = content
        files[f"reports/{stem}.html"] = render(ledger).encode()
        files[f"rows/{stem}.csv"] = ledger.to_frame().to_csv(index=False).encode()
    views = {"configs": [{"config_name": "rows", "data_files": "rows/*.csv"}], "tags": ["fra", "interpretability"]}
    card = yaml_front(views) + _CARD.format(name=name)
    n = len(files) // 3
    print(put(name, files, card, f"{n} ledger{'s' * (n > 1)}", private=private))
