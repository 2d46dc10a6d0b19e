from .figures import blocks as blocks
from .figures import census as census
from .figures import channels as channels
from .figures import head as head
from .figures import pattern as pattern
