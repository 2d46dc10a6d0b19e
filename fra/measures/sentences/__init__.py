"""What claims about sentences measure."""
