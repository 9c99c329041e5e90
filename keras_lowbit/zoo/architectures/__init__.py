"""Float architectures that Keras does not have, one family a file."""
