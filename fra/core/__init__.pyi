from . import crosscoders as crosscoders
from . import sentences as sentences
