"""Scales from data: minimum-maximum, percentile and least squares, in NumPy."""

from __future__ import annotations

import numpy as np

METHODS = ("mse", "minmax", "percentile")
# Below this a scale is a dead channel's: codes are all zero whatever it is.
SMALLEST_SCALE = 1e-8
# Values searched at a time, so that what is computed of them stays in a processor's cache.
_BLOCK = 1 << 15


def squared_error(x, scale, lo, hi):
    """Mean squared error of `x` on a grid, over axis 0."""
    codes = x / scale
    np.clip(np.rint(codes, out=codes), lo, hi, out=codes)
    codes *= scale
    np.subtract(x, codes, out=codes)
    return np.mean(np.square(codes, out=codes), axis=0)


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


def ends_around_zero(x):
    """`(least, greatest)` of the values of `x` and 0.0, as floats; `(0.0, 1.0)` where all are 0.0.

    Nothing but 0.0: any range fits, and a tiny one would make the ratios of a sum extreme.
    """
    least, greatest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    return (least, greatest) if least < greatest else (0.0, 1.0)


def scale_mse(x, lo, hi, candidates: int = 100):
    """Scale of least squared error, a value for each column.

    Searches `candidates` shrinkages of the covering scale, evenly from 1 down to 0.02; the first of
    equals wins, so the result does not depend on the order of `x`.

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
    shrinkages = np.linspace(1.0, 0.02, candidates)
    best = np.empty_like(covering)
    width = max(1, _BLOCK // len(x))
    for start in range(0, x.shape[1], width):
        block = slice(start, start + width)
        columns = np.ascontiguousarray(x[:, block], np.float64)
        best[block] = _shrunk(columns, covering[block], widest[block], lo, hi, shrinkages)
    return np.maximum(best, SMALLEST_SCALE).astype(np.float32)


def _shrunk(x, covering, widest, lo, hi, shrinkages):
    """The best of `widest * shrinkages` and `covering` for each column, shrinkages falling."""
    n = len(x)
    few = max(1, n // 16)
    highest, lowest = np.partition(x, n - few, axis=0)[-few:], np.partition(x, few - 1, axis=0)
    lowest = lowest[:few]
    best, error = covering, squared_error(x, covering, lo, hi)
    for i, shrink in enumerate(shrinkages):
        scale = np.maximum(widest * shrink, SMALLEST_SCALE)
        # What the outermost values alone lose by clipping grows as scales shrink: once it passes
        # the least error, the rest of the search cannot win. A share of 1e-9 is float noise.
        # Every fourth time, because for small kernels it costs as much as a trial.
        if i % 4 == 0:
            above, below = np.maximum(highest - hi * scale, 0), np.maximum(lo * scale - lowest, 0)
            clipped = (np.square(above).sum(axis=0) + np.square(below).sum(axis=0)) / n
            if np.all(clipped * (1 - 1e-9) > error):
                break
        trial = squared_error(x, scale, lo, hi)
        better = trial < error
        best = np.where(better, scale, best)
        error = np.where(better, trial, error)
    return best


def scale_of(x, lo, hi, method: str = "mse", percentile: float = 99.99):
    """Scale of `x`, shape `(n, channels)`, by one of `METHODS`; raises `ValueError` otherwise."""
    if method == "minmax":
        return scale_minmax(x, lo, hi)
    if method == "percentile":
        return scale_minmax(x, lo, hi, percentile)
    if method == "mse":
        return scale_mse(x, lo, hi)
    raise ValueError(f"method must be one of {METHODS}. Got {method!r}")
