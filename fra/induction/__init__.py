"""Which heads are token induction heads, and what claims see of their channels (CIH)."""
