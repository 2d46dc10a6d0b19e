"""Ledgers side by side."""
