"""Float architectures, one family a file."""
