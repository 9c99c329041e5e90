"""Min-max, percentile and mean-squared-error: scales that come from data."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import MSE, MinMax, Percentile
from tests.gradients import gradient


def built(quantizer, shape):
    quantizer.build(shape)
    return quantizer


def activation(cls=MinMax, bits=2, **options):
    return built(cls(bits, role="activation", signed=False, **options), (None, 5))


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


class TestMinMaxOfKernels:
    def test_the_scale_follows_the_kernel(self):
        quantizer = built(MinMax(4, axis=-1), (2, 2))
        kernel = np.float32([[0.7, 7.0], [-0.35, -14.0]])
        for factor in (1, 2):
            codes, scale = encode(quantizer, factor * kernel)
            np.testing.assert_array_equal(codes, [[7, 4], [-4, -7]])  # +-3.5 -> +-4, half to even
            np.testing.assert_allclose(scale, np.float32([0.1, 2.0]) * factor, rtol=1e-6)  # float32

    def test_either_sign_may_decide_on_a_lopsided_grid(self):
        # 2 bits, -2..1: -3 / -2 = 1.5 against 1 / 1
        quantizer = built(MinMax(2), (2,))
        assert encode(quantizer, [-3.0, 1.0])[1] == 1.5
        assert encode(quantizer, [-3.0, 2.0])[1] == 2.0

    def test_gradients_pass_everywhere_and_not_through_the_range(self):
        quantizer = built(MinMax(4), (3,))
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), [7.0, -0.3, 2.2])
        np.testing.assert_allclose(to_x, [1, 1, 1], rtol=1e-6)  # float32

    def test_at_1_bit_codes_are_signs(self):
        codes, scale = encode(built(MinMax(1), (2,)), [0.5, -1.5])
        np.testing.assert_array_equal(codes, [1, -1])
        assert scale == 1.0

    def test_a_kernel_of_zeros_keeps_a_positive_scale(self):
        codes, scale = encode(built(MinMax(4), (2,)), [0.0, 0.0])
        np.testing.assert_array_equal(codes, [0, 0])
        assert scale > 0


class TestMinMaxOfActivations:
    def test_calibration_sets_the_range(self):
        quantizer = activation()
        quantizer.fit_scale(np.float32([[0.0, 1.0, 6.0]]), "mse")
        codes, scale = encode(quantizer, [[-1, 1, 2.9, 3.1, 99]])
        assert scale == 2.0
        np.testing.assert_array_equal(codes, [[0, 0, 1, 2, 3]])

    def test_calls_leave_it_alone_until_it_is_to_move(self):
        quantizer = activation()
        quantizer.fit_scale(np.float32([[0.0, 6.0]]))
        encode(quantizer, [[0, 0, 0, 0, 60]])
        assert quantizer.grid().scale == 2.0

    def test_a_running_range_forgets_with_its_momentum(self):
        """0.75 * 6 + 0.25 * 18 = 9, then 0.75 * 9 + 0.25 * 1 = 7; codes 0..3."""
        quantizer = activation(momentum=0.75)
        quantizer.fit_scale(np.float32([[0.0, 6.0]]))
        quantizer.update_ranges.assign(1.0)
        assert encode(quantizer, [[0, 0, 0, 0, 18]])[1] == 3.0
        assert encode(quantizer, [[0, 0, 0, 0, 1]])[1] == np.float32(7) / 3
        quantizer.update_ranges.assign(0.0)
        assert encode(quantizer, [[0, 0, 0, 0, 99]])[1] == np.float32(7) / 3

    def test_the_first_batch_of_an_uncalibrated_one_is_its_range(self):
        quantizer = activation(momentum=0.75)
        quantizer.update_ranges.assign(1.0)
        assert encode(quantizer, [[0, 0, 0, 0, 6]])[1] == 2.0
        assert float(ops.convert_to_numpy(quantizer.calibrated)) == 1

    def test_signed_grids_follow_the_larger_end(self):
        quantizer = built(MinMax(4, role="activation"), (None, 2))
        quantizer.fit_scale(np.float32([[-14.0, 7.0]]))
        assert quantizer.grid().scale == 2.0

    def test_the_range_stays_when_the_bits_change(self):
        quantizer = activation()
        quantizer.fit_scale(np.float32([[0.0, 6.0]]))
        quantizer.set_bits(4)
        assert quantizer.grid().scale == np.float32(6) / 15

    def test_a_compiled_training_step_moves_it(self):
        made = layers.Quantize(MinMax(4, role="activation", signed=False, momentum=0.5))
        inputs = keras.Input((2,))
        outputs = keras.layers.Dense(1)(layers.Dequantize()(made(inputs)))
        model = keras.Model(inputs, outputs)
        model.compile(optimizer="sgd", loss="mse")
        made.quantizer.fit_scale(np.float32([0.0, 1.0]))
        x, y = np.float32([[0.0, 3.0]]), np.float32([[1.0]])
        model.train_on_batch(x, y)
        assert made.quantizer.grid().scale == np.float32(1) / 15
        made.quantizer.update_ranges.assign(1.0)
        model.train_on_batch(x, y)
        assert made.quantizer.grid().scale == np.float32(2) / 15  # (1 + 3) / 2
        made.quantizer.update_ranges.assign(0.0)
        model.test_on_batch(x, y)
        model.predict_on_batch(x)
        assert made.quantizer.grid().scale == np.float32(2) / 15

    def test_channels_share_the_range(self):
        with pytest.raises(ValueError, match="one range, axis=None"):
            MinMax(role="activation", axis=-1)


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_momentum_lies_from_0_to_below_1(momentum):
    with pytest.raises(ValueError, match="momentum must be"):
        MinMax(momentum=momentum)


def test_percentile_leaves_outliers_out_whatever_calibrate_asks_for():
    x = np.float32([*range(100), 1000])
    quantizer = activation(Percentile, percentile=99.0)
    quantizer.fit_scale(x, "minmax")
    assert quantizer.grid().scale == 33.0


def test_mse_has_a_smaller_error_than_covering_whatever_calibrate_asks_for():
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)

    def error(quantizer):
        quantizer.fit_scale(x, "minmax")
        codes, scale = encode(quantizer, x.reshape(-1, 5))
        return np.mean((codes * scale - x.reshape(-1, 5)) ** 2)

    shape = (None, 5)
    covering, best = (built(c(3, role="activation"), shape) for c in (MinMax, MSE))
    assert error(best) < 0.6 * error(covering)


@pytest.mark.parametrize("cls", [Percentile, MSE])
class TestFixedScales:
    def test_nothing_is_trained_and_gradients_pass_inside(self, cls):
        quantizer = activation(cls)
        quantizer.take_scale(np.float32(2.0))  # codes 0..3
        assert quantizer.trainable_variables == []
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), [[-1.0, -1.1, 3.0, 7.0, 7.1]])
        np.testing.assert_array_equal(to_x, [[1, 0, 1, 1, 0]])

    def test_each_channel_of_a_kernel_has_a_scale(self, cls):
        quantizer = built(cls(4, axis=-1), (2, 2))
        kernel = np.float32([[0.7, 7.0], [-0.7, -14.0]])
        quantizer.fit_scale(kernel)
        np.testing.assert_array_equal(encode(quantizer, kernel)[0][:, 0], [7, -7])
        assert quantizer.grid().scale.shape == (2,)

    def test_the_representable_range_stays_when_the_bits_change(self, cls):
        quantizer = activation(cls)
        quantizer.take_scale(np.float32(2.0))
        quantizer.set_bits(4)
        assert quantizer.grid().scale == pytest.approx(6 / 15, rel=1e-6)  # float32


@pytest.mark.parametrize("percentile", [50, 100.1])
def test_percentiles_lie_above_50_up_to_100(percentile):
    with pytest.raises(ValueError, match="above 50 and at most 100"):
        Percentile(percentile=percentile)


def test_a_search_needs_a_candidate():
    with pytest.raises(ValueError, match="at least 1"):
        MSE(candidates=0)
