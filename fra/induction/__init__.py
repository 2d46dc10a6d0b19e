"""Which heads are token induction heads, and the search for their channels (CIH)."""
