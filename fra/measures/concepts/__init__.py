"""Conceptual induction on natural text that repeats no token."""
