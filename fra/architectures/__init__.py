"""The architectures that `fra` knows, and where a user registers one."""
