"""What is under test: a model, its dictionaries and its text, from a target file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
