"""Claims about attention heads as tests with reproducible verdicts, by feature-resolved attention.

Importing `fra` imports neither torch nor anything built on it: every name of `__init__.pyi` is loaded when it is first
used. No room is named after a public function, so that `fra.census` is the function whatever has been imported.
"""

from importlib.metadata import version
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        return version("fra")
    return _load(name)
