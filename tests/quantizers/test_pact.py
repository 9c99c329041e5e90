"""PACT: Choi et al. 2018, arXiv:1805.06085, by numbers worked by hand."""

import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import PACT
from tests.gradients import gradient


def built(bits=2, *, signed=False, **options):
    quantizer = PACT(bits, signed=signed, **options)
    quantizer.build((None, 5))
    return quantizer


def gradients(quantizer, x):
    return gradient(lambda t: ops.sum(quantizer(t)), x, variables=[quantizer.alpha])


def test_equation_2_rounds_what_equation_1_clips():
    """alpha = 6, 2 bits: scale 2."""
    quantizer = built(alpha=6.0)
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32([[-1, 0.9, 3.0, 5.5, 9]])))
    np.testing.assert_array_equal(ops.convert_to_numpy(codes), [[0, 0, 2, 3, 3]])
    assert ops.convert_to_numpy(scale) == 2.0


@pytest.mark.parametrize(
    ("x", "to_x", "to_alpha"),
    [(-1.0, 0, 0), (0.0, 1, 0), (2.9, 1, 0), (5.99, 1, 0), (6.0, 0, 1), (50.0, 0, 1)],
)
def test_equation_3(x, to_x, to_alpha):
    got_x, got_alpha = gradients(built(alpha=6.0), [[x, -1, -1, -1, -1]])
    np.testing.assert_allclose(got_x, [[to_x, 0, 0, 0, 0]], rtol=1e-6)  # float32
    np.testing.assert_allclose(got_alpha, to_alpha, rtol=1e-6)  # float32


def test_above_the_clip_it_is_the_finite_difference():
    def value(alpha):
        values = built(alpha=alpha)(np.float32([[50, 60, -1, -1, -1]]))
        return ops.convert_to_numpy(values).sum()

    _, to_alpha = gradients(built(alpha=6.0), [[50, 60, -1, -1, -1]])
    np.testing.assert_allclose(to_alpha, (value(6.5) - value(5.5)), rtol=1e-6)  # float32


def test_a_signed_grid_gives_its_lower_end_too():
    """8 bits, codes -128..127, alpha = 127: the lower end is -128 alpha / 127."""
    quantizer = built(8, signed=True, alpha=127.0)
    to_x, to_alpha = gradients(quantizer, [[-200.0, -128.0, 0.0, 126.0, 127.0]])
    np.testing.assert_allclose(to_x, [[0, 1, 1, 1, 0]], rtol=1e-6)  # float32
    np.testing.assert_allclose(to_alpha, 1 - 128 / 127, atol=1e-6)  # float32


def test_the_clip_stays_when_the_bits_change():
    quantizer = built(alpha=6.0)
    quantizer.set_bits(4)
    assert quantizer.grid().scale == np.float32(6) / 15


def test_calibration_sets_the_clip():
    quantizer = built()
    quantizer.fit_scale(np.float32([[0.0, 1.5]]), "minmax")
    assert ops.convert_to_numpy(quantizer.alpha) == 1.5
    assert ops.convert_to_numpy(quantizer.calibrated) == 1


def test_decay_adds_the_square_of_the_clip_to_the_loss():
    layer = layers.Quantize(PACT(4, signed=False, alpha=3.0, decay=0.5))
    layer(np.zeros((1, 2), np.float32))
    assert [ops.convert_to_numpy(loss) for loss in layer.losses] == [4.5]
    plain = layers.Quantize(PACT(4, signed=False))
    plain(np.zeros((1, 2), np.float32))
    assert plain.losses == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "kernel"}, "For kernels use 'lsq' or 'dorefa'"),
        ({"axis": -1}, "one clip, axis=None"),
        ({"alpha": 0.0}, "alpha must be a finite number, above 0"),
        ({"decay": -1.0}, "decay must be a finite number, at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PACT(**options)
