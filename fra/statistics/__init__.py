"""What samples show: estimates, bounds, exact tests, ranks among nulls, Holm, and the rules. It knows no claim."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
