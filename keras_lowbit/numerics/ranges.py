"""Scales from data: minimum-maximum, percentile and least squares, in NumPy."""

from __future__ import annotations

import numpy as np

METHODS = ("minmax", "percentile", "mse")
# Below this a scale is a dead channel's: codes are all zero whatever it is.
SMALLEST_SCALE = 1e-8


def squared_error(x, scale, lo, hi):
    """Mean squared error of `x` on a grid, over axis 0."""
    codes = np.clip(np.rint(x / scale), lo, hi)
    return np.mean((x - codes * scale) ** 2, axis=0)


def scale_minmax(x, lo, hi, percentile: float = 100.0):
    """Smallest scale whose grid covers `x` (or its `percentile`), a value for each column.

    Args:
        x: reals, shape `(n, channels)`.
        lo: lowest code (0 for unsigned grids).
        hi: highest code.
        percentile: share of values, in percent, that may lie inside; 100 covers all.

    Returns:
        float32 scales, shape `(channels,)`.
    """
    if percentile >= 100.0:
        top, bottom = x.max(axis=0), x.min(axis=0)
    else:
        top = np.percentile(x, percentile, axis=0)
        bottom = np.percentile(x, 100.0 - percentile, axis=0)
    scale = np.maximum(top, 0) / hi
    if lo < 0:
        scale = np.maximum(scale, np.minimum(bottom, 0) / lo)
    # Nothing but code 0: any scale fits, and a tiny one would make the ratios of a sum extreme.
    scale = np.where(scale == 0, 1.0 / hi, np.maximum(scale, SMALLEST_SCALE))
    return scale.astype(np.float32)


def scale_mse(x, lo, hi, candidates: int = 100):
    """Scale of least squared error, a value for each column.

    Searches `candidates` shrinkages of the covering scale, evenly from 1 down to 0.02 at 8 bits or
    fewer; the first of equals wins, so the result does not depend on the order of `x`.

    Args:
        x: reals, shape `(n, channels)`.
        lo: lowest code.
        hi: highest code.
        candidates: size of the search.

    Returns:
        float32 scales, shape `(channels,)`.
    """
    covering = widest = scale_minmax(x, lo, hi).astype(np.float64)
    if lo < 0 and hi < -lo:
        # A grid with one more negative code: either sign may set the widest useful scale.
        widest = np.maximum(widest, np.abs(x).max(axis=0) / hi)
    best = covering
    error = squared_error(x, covering, lo, hi)
    for shrink in np.linspace(1.0, 0.02, candidates):
        scale = np.maximum(widest * shrink, SMALLEST_SCALE)
        trial = squared_error(x, scale, lo, hi)
        better = trial < error
        best = np.where(better, scale, best)
        error = np.where(better, trial, error)
    return np.maximum(best, SMALLEST_SCALE).astype(np.float32)


def scale_of(x, lo, hi, method: str = "mse", percentile: float = 99.99):
    """Scale of `x`, shape `(n, channels)`, by one of `METHODS`; raises `ValueError` otherwise."""
    if method == "minmax":
        return scale_minmax(x, lo, hi)
    if method == "percentile":
        return scale_minmax(x, lo, hi, percentile)
    if method == "mse":
        return scale_mse(x, lo, hi)
    raise ValueError(f"method must be one of {METHODS}. Got {method!r}")
