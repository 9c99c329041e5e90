"""Trained thresholds (FAT): Goncharenko et al., arXiv:1812.07872, by numbers worked by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import LSQ, Threshold
from tests.gradients import gradient


def built(shape, threshold, bits=4, alpha=1.0, **options):
    quantizer = Threshold(bits, **options)
    quantizer.build(shape)
    quantizer.threshold.assign(np.broadcast_to(np.float32(threshold), quantizer.threshold.shape))
    quantizer.alpha.assign(np.broadcast_to(np.float32(alpha), quantizer.alpha.shape))
    return quantizer


def shifted(left, right, shift=0.0, alpha=1.0, bits=8):
    quantizer = Threshold(bits, symmetric=False, role="activation")
    quantizer.build((None, 3))
    quantizer.fit_scale(np.float32([left, right]))
    quantizer.shift.assign(shift)
    quantizer.alpha.assign(alpha)
    return quantizer


def values(quantizer, x):
    return ops.convert_to_numpy(quantizer(ops.convert_to_tensor(np.float32(x))))


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


def test_the_scale_is_the_adjusted_threshold_over_the_highest_code():
    """T_max 7, 4 bits, hi 7: alpha 0.5 gives steps of 0.5; 0.2 is clipped to 0.5, 9 to 1.3."""
    for alpha, scale in ((1.0, 1.0), (0.5, 0.5), (0.2, 0.5), (9.0, 1.3)):
        np.testing.assert_allclose(encode(built((3,), 7.0, alpha=alpha), [0.0] * 3)[1], scale, 1e-6)
    codes, _ = encode(built((4,), 7.0, alpha=0.5), [0.26, -1.2, 3.4, 100.0])
    np.testing.assert_array_equal(codes, [1, -2, 7, 7])


def test_unsigned_grids_divide_by_all_their_codes():
    """The corrected formula: 15 steps of 0.4 reach 6."""
    quantizer = built((None, 2), 6.0, signed=False, role="activation")
    np.testing.assert_allclose(values(quantizer, [[6.0, 7.0]]), [[6.0, 6.0]], rtol=1e-6)  # float32


def test_the_gradient_to_alpha_is_that_of_lsq_up_to_the_threshold_over_the_highest_code():
    """ds/dalpha = T_max / hi = 3.5 / 7; LSQ's own damping of 1 / sqrt(N hi) taken out."""
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32") * 2
    ours = built(x.shape, 3.5, alpha=0.75, axis=-1)
    lsq = LSQ(4, axis=-1)
    lsq.build(x.shape)
    lsq.scale.assign(np.full(3, 3.5 * 0.75 / 7, "float32"))
    (to_x, to_alpha), (want_x, want) = (
        gradient(lambda t, q=q: ops.sum(q(t) * t), x, variables=[v])
        for q, v in ((ours, ours.alpha), (lsq, lsq.scale))
    )
    # The two scales are products of three numbers in another order.
    np.testing.assert_allclose(to_x, want_x, rtol=1e-6)
    # Both sum 15 float32 products in one order; the factors differ by roundings.
    np.testing.assert_allclose(to_alpha, want * np.sqrt(15 * 7) * 3.5 / 7, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "passes"), [(0.49, 0), (0.5, 1), (1.0, 1), (1.3, 1), (1.31, 0)])
def test_alpha_feels_a_saturated_value_inside_its_range_only(alpha, passes):
    """Saturated at the top: value = alpha * T_max, so d/dalpha = T_max = 2."""
    quantizer = built((1,), 2.0, alpha=alpha)
    (to_x, to_alpha) = gradient(
        lambda t: ops.sum(quantizer(t)), [50.0], variables=[quantizer.alpha]
    )
    np.testing.assert_allclose(to_alpha, 2.0 * passes, rtol=1e-6)  # float32
    assert to_x == 0


def test_an_asymmetric_grid_has_a_rounded_zero_point():
    """-1..3 at 8 bits: 255 steps of 4 / 255, and -1 lies 63.75 of them below 0."""
    quantizer = shifted(-1.0, 3.0)
    assert quantizer.static_bounds() == (-64, 191)
    codes, scale = encode(quantizer, [[-1.0, 0.0, 3.1]])
    np.testing.assert_array_equal(codes, [[-64, 0, 191]])
    np.testing.assert_allclose(scale, 4 / 255, rtol=1e-6)  # float32


def test_shift_and_width_move_an_asymmetric_grid():
    """Left end -1 + 0.1 * 4 = -0.6, width 0.5 * 4 = 2: steps of 2 / 255, -0.6 is 76.5 of them."""
    assert shifted(-1.0, 3.0, shift=0.1, alpha=0.5).static_bounds() == (-76, 179)
    # Clipped at 0.4: the left end would be 0.6, and 0.0 stays a code.
    assert shifted(-1.0, 3.0, shift=2.0, alpha=0.5).static_bounds() == (0, 255)


@pytest.mark.parametrize(
    ("x", "to_alpha", "to_shift"),
    [
        # Inside: R * (code - x / scale) / 255 with R = 255, scale 1.
        (10.25, 10 - 10.25, 0.0),
        (-300.0, 0.0, 255.0),
        (300.0, 255.0, 255.0),
    ],
)
def test_the_gradient_of_an_asymmetric_grid(x, to_alpha, to_shift):
    quantizer = shifted(-100.0, 155.0)
    found = gradient(
        lambda t: ops.sum(quantizer(t)), [[x]], variables=[quantizer.alpha, quantizer.shift]
    )
    np.testing.assert_allclose(found[0], [[float(to_shift == 0)]])
    np.testing.assert_allclose(found[1:], [to_alpha, to_shift], rtol=1e-5)  # float32


def test_a_new_width_keeps_the_threshold():
    quantizer = built((2,), 3.0, bits=8)
    top = values(quantizer, [9.0, -9.0])
    quantizer.set_bits(4)
    np.testing.assert_allclose(values(quantizer, [9.0, -9.0]), top, rtol=1e-6)  # float32


def test_calibration_takes_the_range_and_resets_alpha():
    quantizer = built((2, 2), 1.0, alpha=0.6, axis=-1)
    quantizer.fit_scale(np.float32([[1.0, -4.0], [-2.0, 3.0]]), "minmax")
    # Float32.
    np.testing.assert_allclose(ops.convert_to_numpy(quantizer.threshold), [2.0, 4.0], rtol=1e-6)
    np.testing.assert_array_equal(ops.convert_to_numpy(quantizer.alpha), [1, 1])


def test_only_alpha_and_shift_are_trained():
    assert [v.name for v in shifted(-1.0, 3.0).trainable_variables] == ["alpha", "shift"]
    assert [v.name for v in built((2,), 1.0).trainable_variables] == ["alpha"]


def test_an_asymmetric_grid_saves_and_loads(tmp_path):
    inputs = keras.Input((3,))
    layer = layers.Quantize(Threshold(8, symmetric=False, role="activation"))
    model = keras.Model(inputs, layers.Dequantize()(layer(inputs)))
    layer.quantizer.fit_scale(np.float32([-1, 3]))
    layer.quantizer.shift.assign(0.05)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    x = np.float32([[-2.0, 0.3, 5.0]])
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, again)))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="alpha_range must hold 1"):
        Threshold(alpha_range=(0.5, 0.9))
    with pytest.raises(ValueError, match="positive and finite"):
        Threshold(alpha_range=(0.5, np.inf))
    with pytest.raises(ValueError, match="symmetric=False is for activations"):
        Threshold(symmetric=False, role="kernel")
