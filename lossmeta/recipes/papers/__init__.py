"""What the papers report, as they print it."""
