"""Scales from data, by numbers worked by hand and by laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_lowbit.numerics import ranges
from keras_lowbit.numerics.ranges import (
    METHODS,
    SMALLEST_SCALE,
    scale_minmax,
    scale_mse,
    scale_of,
    squared_error,
)

pytestmark = pytest.mark.once

values = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)
grids = st.sampled_from([(-7, 7), (-2, 1), (-128, 127), (0, 15), (0, 1)])


def column(x):
    return np.asarray(x, np.float32).reshape(-1, 1)


@pytest.mark.parametrize(
    ("x", "lo", "hi", "scale"),
    [
        ([0.0, 3.5], 0, 7, 0.5),
        ([-3.5, 1.0], -7, 7, 0.5),
        ([-4.0, 1.0], -2, 1, 2.0),  # the negative end decides: 4 / 2
        ([-1.0, 1.5], -2, 1, 1.5),  # the positive one: 1.5 / 1
        ([-9.0, 3.0], 0, 3, 1.0),  # unsigned: negative values do not count
        ([1.0, 2.0], -2, 1, 2.0),
        ([0.0, 0.0], -7, 7, 1 / 7),  # any scale fits zeros
        ([-5.0, -1.0], 0, 7, 1 / 7),
    ],
)
def test_minmax_is_the_smallest_scale_that_covers(x, lo, hi, scale):
    got = scale_minmax(column(x), lo, hi)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32([scale]))


def test_each_column_has_a_scale():
    x = np.array([[1.0, -14.0], [-7.0, 3.5]])
    np.testing.assert_array_equal(scale_minmax(x, -7, 7), np.float32([1.0, 2.0]))


def test_a_percentile_leaves_the_outliers_out():
    x = column([*range(100), 1000])  # 101 values: percentile 99 is exactly value 99
    np.testing.assert_array_equal(scale_minmax(x, 0, 3, 99.0), np.float32([33.0]))
    np.testing.assert_array_equal(scale_minmax(-x, -3, 3, 99.0), np.float32([33.0]))


def test_the_squared_error_is_the_mean_over_a_column():
    # codes of 0.4, 1.6, 9.0 on 0..3 with scale 1: 0, 2, 3; errors 0.16, 0.16, 36
    got = squared_error(column([0.4, 1.6, 9.0]).astype(np.float64), 1.0, 0, 3)
    np.testing.assert_allclose(got, [36.32 / 3])


def test_least_squares_gives_up_an_outlier():
    """100 ones and one 3.0 on codes 0..1: covering (scale 3) sends the ones to 0, error 100/101."""
    x = column([1.0] * 100 + [3.0])
    scale = scale_mse(x, 0, 1)
    # The best is their mean, 103/101 = 1.0198; the search steps by 3 * 0.0099 = 0.0297.
    assert abs(float(scale[0]) - 103 / 101) < 0.0297 / 2 + 1e-6


@given(values, grids)
def test_least_squares_is_never_worse_than_covering(x, grid):
    lo, hi = grid
    x = column(x).astype(np.float64)
    mse = squared_error(x, scale_mse(x, lo, hi).astype(np.float64), lo, hi)
    cover = squared_error(x, scale_minmax(x, lo, hi).astype(np.float64), lo, hi)
    # Rounding the found scale to float32 may cost a few parts in 1e7 of the values' squares.
    assert (mse <= cover + 1e-6 * np.square(x).max()).all()


@pytest.mark.parametrize("grid", [(-127, 127), (-7, 7), (-8, 7), (-2, 1), (0, 15), (-1, 1)])
@pytest.mark.parametrize("rows", [1, 9, 700])
def test_least_squares_is_the_first_best_of_the_whole_search(monkeypatch, grid, rows):
    lo, hi = grid
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, 7)).astype("float32") * np.float32([0, 1, 9, 1e-9, 1, 1, 1])
    x[:, 4] = np.abs(x[:, 4])
    x[:, 5] = np.sign(x[:, 5])  # several scales without an error: the first wins
    x[0, 6] = 50.0
    covering = scale_minmax(x, lo, hi).astype(np.float64)
    widest = np.maximum(covering, np.abs(x).max(axis=0) / hi if lo == -hi - 1 else 0)
    tried = [covering, *(widest * shrink for shrink in np.linspace(1.0, 0.02, 100))]
    tried = np.maximum(tried, SMALLEST_SCALE)
    errors = [squared_error(x.astype(np.float64), scale, lo, hi) for scale in tried]
    wanted = np.take_along_axis(tried, np.argmin(errors, axis=0)[None], axis=0)[0]
    for block in (1 << 20, 3 * rows):  # all columns at once, and three by three
        monkeypatch.setattr(ranges, "_BLOCK", block)
        np.testing.assert_array_equal(scale_mse(x, lo, hi), wanted.astype("float32"))


@given(values, grids, st.sampled_from(METHODS))
def test_scales_are_positive_and_double_with_the_data(x, grid, method):
    x = column(x)
    once, twice = (scale_of(k * x, *grid, method) for k in (np.float32(1), np.float32(2)))
    assert (once > 0).all()
    lo, _ = grid
    # Below, all that `method` covers falls on code 0, where nothing doubles, or the search comes
    # near the smallest scale: from 1e-3 on it tries 0.02 * 1e-3 / 127 = 1.6e-7 at least.
    low, high = np.percentile(x, (0.01, 99.99), axis=0)
    live = np.maximum(high, -low if lo < 0 else 0) > 1e-3
    # To the bit: a factor of 2 moves exponents alone, in float32 as in the search's float64.
    np.testing.assert_array_equal(twice[live], 2 * once[live])


@given(values, grids)
def test_everything_lies_on_a_minmax_grid(x, grid):
    lo, hi = grid
    x = column(x)
    x = np.maximum(x, 0) if lo == 0 else x
    ratio = x / scale_minmax(x, lo, hi)
    assert (ratio <= hi * (1 + 1e-6)).all()
    assert (ratio >= lo * (1 + 1e-6)).all()


def test_an_unknown_method_is_named():
    with pytest.raises(
        ValueError, match=r"one of \('mse', 'minmax', 'percentile'\). Got 'entropy'"
    ):
        scale_of(column([1.0]), 0, 1, "entropy")
