"""CIH channels and sets: how large, how many, what removing them does, where else they work."""
