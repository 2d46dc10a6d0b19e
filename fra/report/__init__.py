"""Pages made of ledger rows. No torch."""
