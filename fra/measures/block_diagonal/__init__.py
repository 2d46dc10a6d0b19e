"""Block-diagonal dictionaries beside dense ones."""
