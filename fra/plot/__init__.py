"""Pictures of a head and of a census: figures (matplotlib, an extra: `pip install 'fra[plot]'`), what objects show of
themselves in a notebook, and the drawings of the report. No torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
