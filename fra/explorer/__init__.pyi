from .command import explore as explore
from .command import run as run
