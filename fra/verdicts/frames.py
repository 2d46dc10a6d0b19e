"""A ledger as a table of pandas: a row a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fra.verdicts.claim import parse_head

if TYPE_CHECKING:
    import pandas as pd

    from fra.verdicts.ledger import Ledger

NUMBERS = ("effect", "low", "high", "bar", "p", "q", "power")
COLUMNS = (
    *("claim", "title", "kind", "target", "head", "layer", "verdict", "effect", "low", "high", "bar", "above"),
    *("p", "q", "n", "power", "decided", "met", "best", "reason", "exploratory", "known", "overturned"),
    *("borderline", "digest"),
)
_SAID = ("decided", "met", "best", "reason", "known", "overturned", "borderline")


def frame(ledger: Ledger) -> pd.DataFrame:
    """Columns claim, title, kind, target, head, layer, verdict, effect, low, high, bar, above (on which side of the bar
    the claim holds), p, q, n, power, decided, met, best, reason, exploratory, known, overturned, borderline, digest.

    Numbers are floats with NaN where the ledger has null; layer and n are whole numbers or missing (Int64); a family's
    own row has no head.
    """
    import pandas as pd

    rows = []
    for row in ledger.verdicts:
        note = ledger.header.claims.get(row.claim)
        detail = row.detail
        said: dict[str, Any] = {
            "claim": row.claim,
            "title": None if note is None else note.title,
            "kind": ledger.kind_of(row.claim),
            "target": row.target,
            "head": row.head,
            "layer": None if row.head is None else parse_head(row.head)[0],
            "verdict": row.verdict,
            **{name: getattr(row, name, None) for name in NUMBERS[:4]},
            "above": None if note is None else note.above,
            "p": row.p,
            "q": row.q,
            "n": row.n,
            "power": detail.get("power"),
            **{name: detail.get(name) for name in _SAID[:4]},
            "exploratory": bool(detail.get("exploratory", False)),
            **{name: detail.get(name) for name in _SAID[4:]},
            "digest": row.digest,
        }
        rows.append(said)
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds = dict.fromkeys(NUMBERS, "float64") | {"layer": "Int64", "n": "Int64"}
    return found.astype(kinds)
