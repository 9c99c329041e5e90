"""Pure functions on codes and scales: no state, no layers. `real = scale * (code - zero_point)`."""
