"""Families of head-output features of an induction head."""
