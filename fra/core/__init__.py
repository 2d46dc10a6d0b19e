"""The exact mathematics of one head: weights, what is frozen, codes, and every way to read the resolved scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
