"""The integer graph, its NumPy reference, and the way from a trained model to it."""
