from .admission import admit as admit
from .documents import Document as Document
from .file import TargetSpec as TargetSpec
from .file import find_target as find_target
from .file import presets as presets
from .file import read_target as read_target
from .target import Target as Target
from .target import load_target as load_target
