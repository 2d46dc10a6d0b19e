"""Dictionaries of head outputs: their quality, their heads, their sources."""
