"""The explorer: one page on which a head's feature-resolved attention on one text is looked at, exactly and offline.

`explore(target, text)` gives the page as HTML text; `python -m fra.explorer TARGET --text "..." -o FILE.html`
writes it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
