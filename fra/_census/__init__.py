"""Every live channel of a layer's heads over many documents, streamed and exact.

The underscore: a room called `census` would put a module in the place of the function `fra.census`.
"""
