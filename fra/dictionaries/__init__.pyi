from . import blockdiag as blockdiag
