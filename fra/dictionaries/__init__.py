"""Dictionaries (SAEs) as linear decoders, and the grammar of the hooks that they read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
