"""Claims about attention heads as tests with reproducible verdicts, by feature-resolved attention.

Importing `fra` imports neither torch nor anything built on it: every name below is loaded when it is first used. The
module behind a public function is private (`fra._resolve`, `fra._census`), so that `fra.resolve` is the function
whatever has been imported.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fra import (
        attribution,
        blockdiag,
        cards,
        cih,
        claim,
        errors,
        evidence,
        exactness,
        gauges,
        induction,
        interventions,
        ledger,
        pairs,
        patching,
        report,
        sentences,
        stats,
        stimuli,
        structured,
        targets,
    )
    from fra._census import census
    from fra._resolve import resolve
    from fra.claim import Claim, Evidence, Verdict, judge
    from fra.interventions import remove
    from fra.targets import load_target

    __version__: str

__all__ = [
    "Claim",
    "Evidence",
    "Verdict",
    "__version__",
    "attribution",
    "blockdiag",
    "cards",
    "census",
    "cih",
    "claim",
    "errors",
    "evidence",
    "exactness",
    "gauges",
    "induction",
    "interventions",
    "judge",
    "ledger",
    "load_target",
    "pairs",
    "patching",
    "remove",
    "report",
    "resolve",
    "sentences",
    "stats",
    "stimuli",
    "structured",
    "targets",
]

_HOME = {
    "Claim": "fra.claim",
    "Evidence": "fra.claim",
    "Verdict": "fra.claim",
    "judge": "fra.claim",
    "census": "fra._census",
    "load_target": "fra.targets",
    "remove": "fra.interventions",
    "resolve": "fra._resolve",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        value: Any = version("fra")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in __all__:
        value = import_module(f"fra.{name}")
    else:
        raise AttributeError(f"module 'fra' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
