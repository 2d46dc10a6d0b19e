"""Pairs of features on natural text."""
