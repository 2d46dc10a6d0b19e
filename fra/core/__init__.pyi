from . import sentences as sentences
