"""Affine: the fixed grid where images come in."""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.quantizers import Affine
from tests.gradients import gradient


def built(*args, **options):
    quantizer = Affine(*args, **options)
    quantizer.build((None, 4))
    return quantizer


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


def test_every_pixel_keeps_a_code_of_its_own():
    """Pixels rescaled to -1..1: scale 1 / 127.5, pixel 0 at code -128, real -1 + 128 / 127.5."""
    scale = 1 / 127.5
    quantizer = built(scale=scale, lo=-128, offset=-1 + 128 * scale)
    pixels = np.arange(256, dtype=np.float32)
    codes, _ = encode(quantizer, pixels / np.float32(127.5) - 1)
    np.testing.assert_array_equal(codes, pixels - 128)
    assert quantizer.grid().zero_point == 0


def test_gradients_pass_inside_only():
    quantizer = built(scale=0.5, lo=-2, bits=3)  # codes -2..5
    (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), [-1.25, -1.5, 2.75, 3.0])
    np.testing.assert_array_equal(to_x, [1, 0, 1, 0])


def test_calibration_covers_the_values_and_zero():
    quantizer = built()
    quantizer.fit_scale(np.float32([-1.0, 0.5, 4.1]))
    assert quantizer.grid().scale == np.float32(5.1 / 255)
    assert quantizer.static_bounds() == (-50, 205)  # -1 * 255 / 5.1
    quantizer.fit_scale(np.float32([1.0, 2.55]))
    assert quantizer.static_bounds() == (0, 255)
    assert quantizer.grid().scale == pytest.approx(0.01, rel=1e-6)  # float32


def test_a_given_scale_stays_and_counts_as_calibrated():
    quantizer = built(scale=0.25, lo=-3)
    assert float(ops.convert_to_numpy(quantizer.calibrated)) == 1
    quantizer.fit_scale(np.float32([100.0]))
    assert quantizer.grid().scale == 0.25
    assert float(ops.convert_to_numpy(built().calibrated)) == 0


def test_narrower_codes_keep_the_ends():
    quantizer = built(scale=0.1, lo=-51)  # reals -5.1..20.4 over 255 steps
    quantizer.set_bits(4)
    assert quantizer.static_bounds() == (-3, 12)
    assert quantizer.grid().scale == pytest.approx(1.7, rel=1e-6)  # float32
    again = Affine.from_config(quantizer.get_config())
    again.build((None, 4))
    assert again.static_bounds() == (-3, 12)
    assert again.grid().scale == quantizer.grid().scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lo": 1}, r"lo must lie in -255\.\.0. Got 1"),
        ({"lo": -16, "bits": 4}, r"lo must lie in -15\.\.0. Got -16"),
        ({"scale": 0.0}, "scale must be a finite number, above 0"),
        ({"scale": np.inf}, "scale must be a finite number, above 0"),
        ({"offset": np.nan}, "offset must be a finite number"),
        ({"role": "kernel"}, "role must be one of .*activation.* Got 'kernel'"),
        ({"axis": -1}, r"one grid serves the whole tensor\. Got axis=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Affine(**options)
