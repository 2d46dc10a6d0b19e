"""What holds by algebra, and what must break it."""
