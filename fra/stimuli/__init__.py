"""Documents that claims are measured on."""
