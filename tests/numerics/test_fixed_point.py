"""Constants of the fixed-point arithmetic, by numbers worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_lowbit.numerics import fixed_point
from keras_lowbit.numerics.fixed_point import (
    activation_bounds,
    add_parameters,
    logistic_codes,
    product_multiplier,
    settled_scale,
    softmax_powers,
)

pytestmark = pytest.mark.once


def test_the_multiplier_is_rounded_to_float32_at_each_step():
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0.01, 1, (3, 1000)).astype(np.float32)
    ours = np.array([product_multiplier(*abc) for abc in zip(a, b, c, strict=True)])
    once = (a.astype(np.float64) * b / c).astype(np.float32)
    np.testing.assert_array_equal(ours, (a * b) / c)
    assert (ours != once).any()  # or this test would show nothing


def test_the_multiplier_has_one_float32_value_a_channel():
    m = product_multiplier(0.5, [0.25, 0.5, 2.0], 0.125)
    assert m.dtype == np.float32
    np.testing.assert_array_equal(m, [1.0, 2.0, 8.0])


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((1.0, 1.0, 1.0), (1 << 20, 1 << 20, 20)),
        ((1.0, 0.5, 1.0), (1 << 20, 1 << 19, 20)),
        ((3.0, 1.0, 1.0), (3 << 19, 1 << 19, 19)),  # floor(log2(3)) = 1
        ((0.75, 0.75, 1.0), (3 << 19, 3 << 19, 21)),  # floor(log2(0.75)) = -1
        ((1.0, 2.0**-10, 1.0), (1 << 20, 1 << 10, 20)),
        ((2.0**-10, 2.0**-10, 1.0), (1 << 20, 1 << 20, 30)),
        # float32(0.1 / 0.3) = 0.33333334: e = -2, shift 22, 0.33333334 * 2^22 = 1398101.375
        ((0.1, 0.1, 0.3), (1398101, 1398101, 22)),
    ],
)
def test_additions_use_21_bit_multipliers(scales, expected):
    assert add_parameters(*scales) == expected


@given(st.floats(2**-9, 255), st.floats(2**-9, 255))
def test_the_larger_multiplier_of_an_addition_has_21_bits(a, b):
    k_a, k_b, shift = add_parameters(a, b, 1.0)
    assert 1 << 20 <= max(k_a, k_b) <= 1 << 21
    assert k_a / 2**shift == pytest.approx(a, abs=2.0**-shift)  # half a unit, and a float32 ratio
    assert k_b / 2**shift == pytest.approx(b, abs=2.0**-shift)  # as above


@pytest.mark.parametrize("scales", [(256.0, 1.0, 1.0), (1.0, 0.0009, 1.0), (0.0, 1.0, 1.0)])
def test_additions_of_far_scales_are_refused(scales):
    with pytest.raises(ValueError, match="closer together"):
        add_parameters(*scales)


@pytest.mark.parametrize(
    ("activation", "scale", "zero_point", "dtype", "expected"),
    [
        ("none", 0.1, 3, "int8", (-128, 127)),
        ("none", 0.1, 3, "uint8", (0, 255)),
        ("relu", 0.1, 3, "int8", (3, 127)),
        ("relu6", 0.1, 3, "int8", (3, 63)),
        ("relu6", 0.01, 3, "int8", (3, 127)),
        ("relu6", 6 / 15, -128, "int8", (-128, -113)),
        ("relu6", 6 / 3, -128, "int8", (-128, -125)),
        ("relu6", 6 / 255, 0, "uint8", (0, 255)),
        ("relu_n1_to_1", 1 / 7, 0, "int8", (-7, 7)),
        ("relu_n1_to_1", 1 / 127, 0, "int8", (-127, 127)),
        ("relu_n1_to_1", 1.0, 0, "int8", (-1, 1)),
        ("relu6", 4.0, 0, "int8", (0, 2)),  # 1.5 -> 2: half to even
        ("relu6", 4.0, 1, "int8", (1, 2)),  # 2.5 -> 2
    ],
)
def test_activations_clip_codes(activation, scale, zero_point, dtype, expected):
    assert activation_bounds(activation, scale, zero_point, dtype) == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_relu6_at_six_over_hi_clips_every_unsigned_width(bits):
    hi = 2**bits - 1
    assert activation_bounds("relu6", float(np.float32(6 / hi)), -128) == (-128, -128 + hi)


@pytest.mark.parametrize("bits", range(2, 9))
def test_relu_n1_to_1_at_one_over_hi_clips_every_signed_width(bits):
    hi = 2 ** (bits - 1) - 1
    assert activation_bounds("relu_n1_to_1", float(np.float32(1 / hi)), 0) == (-hi, hi)


def test_unknown_activations_and_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"relu_n1_to_1.*'tanh'"):
        activation_bounds("tanh", 1.0, 0)
    with pytest.raises(ValueError, match="'int32'"):
        activation_bounds("relu", 1.0, 0, "int32")


def test_the_logistic_counts_in_256ths():
    # Reals 0, log 3 and -log 3: 1/2, 3/4, 1/4 of 256, less 128; code -128 stands for 0.
    codes = logistic_codes(np.log(3), 5)
    assert codes.shape == (256,)
    assert codes[[5 + 128, 6 + 128, 4 + 128]].tolist() == [0, 64, -64]
    # A share of nearly 1 would be code 128, which int8 does not have.
    assert codes[[0, 255]].tolist() == [-128, 127]
    assert (np.diff(codes) >= 0).all()


def test_a_scale_with_ties_moves_until_processors_agree():
    """128 / 256 = 1/2: half to even is 0, half up is 1. 1 / 255 has no ties, for 255 is odd."""
    assert product_multiplier(1.0, 1.0, 256.0) == 1 / 256
    settled = settled_scale(1.0, 1.0, 256.0)
    assert 0 < abs(settled / 256 - 1) < 1e-6
    m = float(product_multiplier(1.0, 1.0, settled))
    products = np.arange(-65025, 65026)
    on_x86 = np.rint(products.astype(np.float32) * np.float32(m))
    on_arm = np.floor(products * m + 0.5)
    np.testing.assert_array_equal(on_x86, on_arm)
    scale = float(np.float32(255.0))
    assert settled_scale(1.0, 1.0, scale) == scale


def test_scales_of_all_sizes_settle():
    random = np.random.default_rng(0)
    for _ in range(60):
        a, b = np.exp(random.uniform(-8, 0, 2))
        scale = a * b / 2.0 ** random.uniform(-15.9, 7.9)
        assert abs(settled_scale(a, b, scale) / scale - 1) < 1e-6


def test_a_scale_that_does_not_settle_is_refused(monkeypatch):
    monkeypatch.setattr(fixed_point, "_SETTLING_STEPS", 0)
    with pytest.raises(ValueError, match="No scale near 256 settles"):
        settled_scale(1.0, 1.0, 256.0)


def test_softmax_powers_fall_from_one():
    powers = softmax_powers(np.log(2))
    assert powers.shape == (256,)
    assert powers.dtype == np.float32
    np.testing.assert_allclose(powers[:4], [1, 0.5, 0.25, 0.125], rtol=1e-6)  # ln 2 in float32
