"""Levels of least squared error from data: Lloyd's algorithm in one dimension, in NumPy."""

from __future__ import annotations

import statistics

import numpy as np

ITERATIONS = 20
# Reach of the levels of a filter of zeros: an even number of levels has none at 0.
NOTHING = 1e-5
_GAUSS = statistics.NormalDist()


def gaussian_shares(count: int) -> np.ndarray:
    """Shares of the data below each of `count` levels that suit a Gaussian best, for many levels.

    The best density of levels is the cube root of the data's (Panter, Dite 1951): for a Gaussian a
    Gaussian of sqrt(3) times its width, so level k stands at `Phi(sqrt(3) Phi^-1((k - 1/2) / K))`.
    """
    middle = [(k + 0.5) / count for k in range(count)]
    return np.array([_GAUSS.cdf(3**0.5 * _GAUSS.inv_cdf(share)) for share in middle])


def levels_of(x: np.ndarray, count: int, iterations: int = ITERATIONS) -> np.ndarray:
    """`count` rising levels of `x` (one dimension), by Lloyd's algorithm from Gaussian quantiles.

    Alternates `idx = nearest level` and `level = mean of its x`. Levels without data stay where
    they are. Data of fewer values than levels get evenly spaced levels over their range.

    Returns:
        float64, strictly rising.
    """
    x = np.sort(np.asarray(x, np.float64))
    reach = max(abs(x[0]), abs(x[-1])) or NOTHING
    levels = np.quantile(x, gaussian_shares(count))
    if np.unique(x).size < count or np.any(np.diff(levels) <= 1e-6 * reach):
        levels = np.linspace(-reach, reach, count)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    for _ in range(iterations):
        ends = np.searchsorted(x, (levels[:-1] + levels[1:]) / 2, side="right")
        ends = np.concatenate([[0], ends, [x.size]])
        held = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(held, 1)
        levels = np.where(held > 0, means, levels)
    # Neighbours that met stay a hair apart, so that the order is strict.
    for k in range(1, count):
        levels[k] = max(levels[k], levels[k - 1] + 1e-4 * reach)
    return levels
