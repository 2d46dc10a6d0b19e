"""What a number means: claims, conditions, the one place that decides, the judge, the ledger. No torch, no pytest."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
