"""Codes and their gradients, by numbers worked by hand and by laws."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from keras import ops

from keras_lowbit.numerics import uniform
from tests.gradients import compiled, gradient

reals = st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4)
scales = st.floats(2.0**-10, 8, width=32)
grids = st.sampled_from([(-7, 7), (-2, 1), (-128, 127), (0, 255), (0, 3), (0, 1)])


def codes_of(x, scale, lo, hi):
    return ops.convert_to_numpy(
        uniform.quantize(ops.convert_to_tensor(np.float32(x)), np.float32(scale), lo, hi)
    )


def test_codes_are_rounded_half_to_even_and_clipped():
    x = [-9.0, -1.75, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 1.6, 9.0]
    # halves of the scale 0.5: -3.5 -> -4 (clipped to -3 first), -1.5 -> -2, -0.5 -> 0, ...
    expected = [-3, -3, -2, 0, 0, 0, 2, 2, 3, 3]
    np.testing.assert_array_equal(codes_of(x, 0.5, -3, 3), expected)


@given(reals, scales, grids)
def test_codes_are_whole_numbers_of_the_grid(x, scale, grid):
    codes = codes_of(x, scale, *grid)
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes.min() >= grid[0]
    assert codes.max() <= grid[1]


@given(reals, scales, grids)
def test_quantizing_twice_changes_nothing(x, scale, grid):
    codes = codes_of(x, scale, *grid)
    np.testing.assert_array_equal(codes_of(codes * np.float32(scale), scale, *grid), codes)


@given(reals, scales, grids)
def test_codes_never_decrease(x, scale, grid):
    assert (np.diff(codes_of(np.sort(x), scale, *grid)) >= 0).all()


@given(reals, scales, grids)
@example([0.5, 1.5, 2.5, -0.5], 1.0, (-7, 7))
def test_inside_the_error_is_at_most_half_a_scale(x, scale, grid):
    x = np.clip(np.float32(x), *np.float32(scale) * np.float32(grid))
    error = np.abs(codes_of(x, scale, *grid) * np.float32(scale) - x)
    assert (error <= 0.5 * scale * (1 + 1e-4)).all()


@given(reals, scales, grids)
def test_doubling_reals_and_scale_changes_no_code(x, scale, grid):
    np.testing.assert_array_equal(
        codes_of(x, scale, *grid), codes_of(2 * np.float32(x), 2 * scale, *grid)
    )


def product_then_quantize(x, a, scale):
    """Quantize what a multiplication just made: XLA fuses the two, in some shapes only."""
    return uniform.quantize(x * a, scale, -7.0, 7.0, None)


@pytest.mark.parametrize("shape", [(7,), (25, 3), (192, 3), (400, 5)])
def test_compiled_codes_are_whole_where_four_of_five_saturate(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    a, scale = np.float32(2.8), np.float32(0.1)
    codes = compiled(product_then_quantize)(x, a, scale)
    np.testing.assert_array_equal(codes, np.clip(np.rint(x * a * (1 / scale)), -7, 7))
    if x.size > 1000:
        assert 0.75 < (np.abs(codes) == 7).mean() < 0.85


class TestGradient:
    """Scale 0.5, codes -8..7, a reader that multiplies by 0.5 and 1: `d(scale * code)`.

    x = 0.6: ratio 1.2, code 1       to x 1, to the scale 1 - 1.2 = -0.2
    x = 10: above                    to x 0, to the scale 7
    x = -10: below                   to x 0, to the scale -8
    x = 3.75: ratio 7.5, at hi + 0.5: still inside      1, 7 - 7.5 = -0.5
    x = -4.25: ratio -8.5, at lo - 0.5: still inside    1, -8 + 8.5 = 0.5
    x = 3.5: ratio 7, the end code itself               1, 0
    """

    x = (0.6, 10.0, -10.0, 3.75, -4.25, 3.5)
    to_x = (1, 0, 0, 1, 1, 1)
    to_scale = (-0.2, 7, -8, -0.5, 0.5, 0)

    def both(self, x, scale, gradient_scale=1.0):
        def value(x, scale):
            codes = uniform.quantize(x, scale, -8.0, 7.0, gradient_scale)
            return ops.sum(codes * ops.stop_gradient(scale))

        return gradient(value, x, scale)

    def test_to_x(self):
        np.testing.assert_array_equal(self.both(self.x, 0.5)[0], self.to_x)

    def test_to_the_scale(self):
        got = [self.both([x], 0.5)[1] for x in self.x]
        np.testing.assert_allclose(got, self.to_scale, atol=1e-6)  # float32

    def test_just_past_the_mask_it_is_that_of_the_outside(self):
        above, below = np.nextafter(np.float32([3.75, -4.25]), np.float32([9, -9]))
        np.testing.assert_array_equal(self.both([above, below], 0.5)[0], [0, 0])
        np.testing.assert_array_equal(self.both([above], 0.5)[1], 7)
        np.testing.assert_array_equal(self.both([below], 0.5)[1], -8)

    def test_the_scale_of_a_channel_feels_its_channel(self):
        x = np.float32([[0.6, 1.2], [10.0, -20.0]])
        to_x, to_scale = self.both(x, np.float32([0.5, 1.0]))
        np.testing.assert_array_equal(to_x, [[1, 1], [0, 0]])
        np.testing.assert_allclose(to_scale, [-0.2 + 7, -0.2 - 8], rtol=1e-6)  # float32

    def test_the_gradient_scale_damps_the_scale_only(self):
        to_x, to_scale = self.both([0.6, 10.0], 0.5, 0.25)
        np.testing.assert_array_equal(to_x, [1, 0])
        np.testing.assert_allclose(to_scale, 0.25 * 6.8, rtol=1e-6)  # float32

    def test_none_stops_the_gradient_of_the_scale(self):
        to_x, to_scale = self.both([0.6, 10.0], 0.5, None)
        np.testing.assert_array_equal(to_x, [1, 0])
        np.testing.assert_array_equal(to_scale, 0)

    @pytest.mark.parametrize("x", [[9.0, 5.0, 4.5], [-9.0, -5.0], [9.0, -9.0, 5.0, 7.0]])
    def test_outside_it_is_the_finite_difference(self, x):
        h = 2.0**-6
        difference = sum(
            (codes_of(v, 0.5 + h, -8, 7) * (0.5 + h) - codes_of(v, 0.5 - h, -8, 7) * (0.5 - h))
            / (2 * h)
            for v in x
        )
        to_x, to_scale = self.both(x, 0.5)
        np.testing.assert_array_equal(to_x, 0)
        np.testing.assert_allclose(to_scale, difference, rtol=1e-6)  # float32


class TestSigns:
    def test_zero_is_positive_and_the_scale_is_the_mean_magnitude(self):
        x = ops.convert_to_tensor(np.float32([[0.0, -3.0], [-2.0, 1.0]]))
        codes, scale = uniform.signs(x, (0,))
        np.testing.assert_array_equal(ops.convert_to_numpy(codes), [[1, -1], [-1, 1]])
        np.testing.assert_array_equal(ops.convert_to_numpy(scale), [1, 2])

    def test_a_dead_channel_keeps_a_positive_scale(self):
        _, scale = uniform.signs(ops.zeros((3, 1)), (0,))
        assert float(ops.convert_to_numpy(scale)[0]) > 0

    @pytest.mark.parametrize(("limit", "expected"), [(1.0, [1, 1, 0, 1]), (None, [1, 1, 1, 1])])
    def test_gradients_pass_up_to_the_limit(self, limit, expected):
        def value(x):
            codes, scale = uniform.signs(x, (0,), limit)
            return ops.sum(codes * ops.stop_gradient(scale))

        (to_x,) = gradient(value, [0.5, -1.0, 1.0625, 0.0])
        np.testing.assert_allclose(to_x, expected, rtol=1e-6)  # float32
