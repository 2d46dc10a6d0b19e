"""One module per claim or pair of claims, named after it; seven rooms that do not know each other."""
