"""The search for the channels of one head: their exact effects, nulls, plantings and power."""
