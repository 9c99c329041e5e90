"""LSQ: Esser et al. 2020, arXiv:1902.08153, by numbers worked by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import LSQ
from keras_lowbit.quantizers.state import PositiveScale
from tests.gradients import gradient


def built(shape, scale, bits=4, **options):
    quantizer = LSQ(bits, **options)
    quantizer.build(shape)
    quantizer.scale.assign(np.broadcast_to(np.float32(scale), quantizer.scale.shape))
    return quantizer


def gradients(quantizer, x):
    """To `x` and to the scale, of the sum of the values."""
    return gradient(lambda t: ops.sum(quantizer(t)), x, variables=[quantizer.scale])


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


def test_the_gradient_of_equations_1_to_3():
    """Kernel of 3 weights, scale 0.5, 4 bits: codes -7..7, damped by 1 / sqrt(3 * 7).

    x = 0.6 -> 1.2, code 1: 1 and -0.2        x = 10: 0 and 7        x = -10: 0 and -7
    """
    for x, to_scale in ((0.6, -0.2), (10.0, 7), (-10.0, -7)):
        got_x, got_scale = gradients(built((3,), 0.5), [x, 0.0, 0.0])
        np.testing.assert_array_equal(got_x, [float(abs(x) < 1), 1, 1])
        np.testing.assert_allclose(got_scale, to_scale / np.sqrt(21), rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("shape", "options", "n"),
    [
        ((3, 2), {}, 6),  # a kernel: all weights
        ((3, 2), {"axis": -1}, 6),  # ... whether or not they share a scale
        ((5, 5, 2, 3), {"axis": (-2, -1)}, 150),
        ((None, 4, 5, 3), {"role": "activation"}, 60),  # features of one sample
        ((None, None, None, 3), {"role": "activation"}, 60),  # counted in the call
    ],
)
def test_the_scale_is_damped_by_all_weights_or_the_features_of_a_sample(shape, options, n):
    quantizer = built(shape, 1.0, **options)
    x = np.zeros([{None: d}.get(s, s) for s, d in zip(shape, (2, 4, 5, 3), strict=False)], "f")
    x.flat[0] = 100.0
    _, to_scale = gradients(quantizer, x)
    np.testing.assert_allclose(to_scale.flat[0], 7 / np.sqrt(n * 7), rtol=1e-5)  # float32
    assert (to_scale.reshape(-1)[1:] == 0).all()


@pytest.mark.parametrize(
    ("bits", "options", "factor"),
    [
        (2, {"role": "activation"}, 1.0),
        (4, {"role": "activation"}, 1.0),
        (8, {"role": "activation"}, (7 / 127) ** 2),
        (8, {"role": "activation", "signed": False}, (15 / 255) ** 2),
        (8, {}, (7 / 127) ** 2),
    ],
)
def test_above_4_bits_the_scale_is_damped_by_the_ratio_of_the_grids_squared(bits, options, factor):
    quantizer = built((1, 3), 1.0, bits=bits, **options)
    _, hi = quantizer.static_bounds()
    _, to_scale = gradients(quantizer, [[1e4, 0.0, 0.0]])
    # A float32 rsqrt, two products and a sum of three: a few parts in 1e7.
    np.testing.assert_allclose(to_scale, factor * hi / np.sqrt(3 * hi), rtol=1e-5)


def test_at_1_bit_codes_are_signs_and_the_scale_is_the_mean_magnitude():
    """Columns (0.5, -1.5) and (0, -0.5): means 1.0 and 0.25; the gradient stops at |x| > 1."""
    quantizer = built((2, 2), [9.0, 9.0], bits=1, axis=-1)
    x = [[0.5, 0.0], [-1.5, -0.5]]
    codes, scale = encode(quantizer, x)
    np.testing.assert_array_equal(codes, [[1, 1], [-1, -1]])
    np.testing.assert_array_equal(scale, [1.0, 0.25])
    to_x, to_scale = gradients(quantizer, x)
    np.testing.assert_allclose(to_x, [[1, 1], [0, 1]], rtol=1e-6)  # float32
    np.testing.assert_array_equal(to_scale, [0, 0])
    with pytest.raises(ValueError, match=r"encode\(kernel\)"):
        quantizer.grid()


@pytest.mark.parametrize(("signed", "codes"), [(True, [-1, 0, 0, 1]), (False, [0, 0, 0, 1])])
def test_activations_at_1_bit_stay_uniform(signed, codes):
    quantizer = built((None, 4), 1.0, bits=1, role="activation", signed=signed)
    np.testing.assert_array_equal(encode(quantizer, [[-3, -0.4, 0.4, 3]])[0], [codes])


class TestMaxValue:
    """A ReLU6 in front of 4 unsigned bits: the scale never passes 6 / 15 = 0.4."""

    def quantizer(self, scale):
        return built((None, 1), scale, role="activation", signed=False, max_value=6.0)

    def test_it_caps_the_scale_in_use(self):
        assert encode(self.quantizer(1.0), [[6.0]]) == (15, np.float32(6.0) / np.float32(15))
        assert encode(self.quantizer(0.25), [[6.0]]) == (15, 0.25)
        assert self.quantizer(1.0).grid().scale == np.float32(6.0) / np.float32(15)

    def test_a_scale_above_the_cap_still_learns(self):
        # 0.5 / 0.4 = 1.25, code 1: 1 - 1.25 = -0.25, damped by 1 / sqrt(1 * 15)
        _, to_scale = gradients(self.quantizer(1.0), [[0.5]])
        np.testing.assert_allclose(to_scale, -0.25 / np.sqrt(15), rtol=1e-5)  # float32

    @pytest.mark.parametrize("value", [0.0, -6.0])
    def test_it_is_positive(self, value):
        with pytest.raises(ValueError, match="max_value must be a finite number, above 0"):
            LSQ(max_value=value)


class TestSetBits:
    @pytest.mark.parametrize(
        ("options", "bits", "scale"),
        [
            ({}, 2, 7.0),  # hi 7 -> 1
            ({}, 8, 7 / 127),
            ({"role": "activation", "signed": False}, 2, 5.0),  # hi 15 -> 3
            ({"role": "activation", "signed": False}, 8, 15 / 255),
        ],
    )
    def test_the_representable_range_stays(self, options, bits, scale):
        quantizer = built((4, 3), 1.0, **options)
        _, before = quantizer.static_bounds()
        quantizer.set_bits(bits)
        assert quantizer.bits == bits
        _, after = quantizer.static_bounds()
        got = float(ops.convert_to_numpy(quantizer.scale))
        assert got == pytest.approx(scale, rel=1e-6)  # float32
        assert got * after == pytest.approx(before, rel=1e-6)  # float32

    def test_before_build_it_sets_the_width_to_build_with(self):
        quantizer = LSQ(8)
        quantizer.set_bits(3)
        quantizer.build((2, 2))
        assert quantizer.static_bounds() == (-4, 3)

    def test_compiled_steps_see_it_without_a_second_trace(self, backend):
        traces = []

        class Counting(LSQ):
            def to_codes(self, x):
                traces.append(1)
                return super().to_codes(x)

        class Encode(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.quantizer = Counting(8)

            def build(self, shape):
                self.quantizer.build((4, 3))

            def call(self, x):
                return self.quantizer.encode(x)[0]

        layer = Encode()
        model = keras.Sequential([keras.Input((3,), batch_size=4), layer])
        model.compile()
        x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        layer.quantizer.fit_scale(x)
        counts = []
        for bits in (8, 4, 2, 1, 8):
            layer.quantizer.set_bits(bits)
            codes = model.predict_on_batch(x)
            counts.append(len(traces))
            np.testing.assert_array_equal(codes, encode(layer.quantizer, x)[0])
            traces.pop()
            if bits == 1:
                assert set(np.unique(codes)) == {-1, 1}
        if backend != "torch":  # which runs eagerly
            assert len(set(counts)) == 1


class TestPositiveScale:
    def test_it_holds_a_scale_above_zero(self):
        w = ops.convert_to_tensor(np.float32([-1.0, 0.0, 0.5]))
        np.testing.assert_array_equal(
            ops.convert_to_numpy(PositiveScale()(w)), np.float32([1e-8, 1e-8, 0.5])
        )

    def test_it_lets_nan_through_for_the_guard(self):
        assert np.isnan(ops.convert_to_numpy(PositiveScale()(np.float32([np.nan])))[0])

    def test_an_optimizer_step_cannot_make_a_scale_negative(self):
        quantizer = built((2, 2), 0.5)
        optimizer = keras.optimizers.SGD(10.0)
        optimizer.build([quantizer.scale])
        optimizer.apply([ops.ones(())], [quantizer.scale])
        assert float(ops.convert_to_numpy(quantizer.scale)) == np.float32(1e-8)

    def test_its_config_comes_back(self):
        assert PositiveScale.from_config(PositiveScale(0.1).get_config()).smallest == 0.1


def test_calibration_uses_the_method_that_is_asked_for():
    x = np.float32([[0.0, 1.0, 1.0, 1.0, 30.0]])
    quantizer = built((None, 5), 1.0, bits=2, role="activation", signed=False)
    quantizer.fit_scale(x, "minmax")
    assert float(ops.convert_to_numpy(quantizer.scale)) == 10.0
    assert float(ops.convert_to_numpy(quantizer.calibrated)) == 1.0
    quantizer.fit_scale(x, "percentile")
    # percentile 99.99 of 5 values: 1 + 0.9996 * 29 = 29.9884
    assert float(ops.convert_to_numpy(quantizer.scale)) == pytest.approx(29.9884 / 3, rel=1e-5)


class TestElementWiseGradientScaling:
    """Lee et al. 2021, arXiv:2104.00903, eq. of g_xn by hand: 4 bits, codes -7..7, delta 0.7.

    x / scale   code   off     off * 0.7 / 14    g = 2        g = -2
    0.6         1      -0.4    -0.02             2 - 0.04     -2 - 0.04
    1.2         1      0.2     0.01              2 + 0.02     -2 + 0.02
    7.3         7      0       0                 2            -2
    9           7                                0            0
    """

    x = (0.3, 0.6, 3.65, 4.5)
    up, down = (1.96, 2.02, 2.0, 0.0), (-2.04, -1.98, -2.0, 0.0)

    def gradients(self, quantizer, slopes, x=x):
        def loss(t):
            return ops.sum(quantizer(t) * ops.convert_to_tensor(np.float32(slopes)))

        return gradient(loss, x, variables=[quantizer.scale])

    @pytest.mark.parametrize("role", ["kernel", "activation"])
    def test_the_gradient_by_hand(self, role):
        shape = (4,) if role == "kernel" else (1, 4)
        quantizer = built(shape, 0.5, role=role, gradient="ewgs", delta=0.7)
        x = np.reshape(np.float32(self.x), shape)
        for g, wanted in ((2.0, self.up), (-2.0, self.down)):
            to_x, _ = self.gradients(quantizer, g, x)
            # 0.6 - 1 in float32 has 7 digits, a twentieth of it is added to 2.
            np.testing.assert_allclose(to_x.reshape(-1), wanted, rtol=1e-6)

    def test_each_channel_by_its_own_scale(self):
        quantizer = built((2, 2), [0.5, 1.0], axis=-1, gradient="ewgs", delta=0.7)
        to_x, _ = self.gradients(quantizer, 2.0, [[0.3, 0.6], [0.6, 1.2]])
        np.testing.assert_allclose(to_x, [[1.96, 1.96], [2.02, 2.02]], rtol=1e-6)  # float32

    def test_codes_and_the_gradient_to_the_scale_are_those_of_lsq(self):
        x = np.random.default_rng(0).normal(size=(31, 3)).astype(np.float32)
        slopes = np.random.default_rng(1).normal(size=x.shape)
        plain = built(x.shape, 0.3, axis=-1)
        bent = built(x.shape, 0.3, axis=-1, gradient="ewgs", delta=1.0)
        for a, b in zip(encode(plain, x), encode(bent, x), strict=True):
            np.testing.assert_array_equal(a, b)
        (x1, scale1), (x2, scale2) = (self.gradients(q, slopes, x) for q in (plain, bent))
        # Two compilations of one sum may differ in their order.
        np.testing.assert_allclose(scale1, scale2, rtol=1e-6)
        assert np.abs(x1 - x2).max() > 0.01

    def test_the_variable_delta_rules(self):
        quantizer = built((4,), 0.5, gradient="ewgs", delta=0.7)
        quantizer.delta.assign(0.0)
        to_x, _ = self.gradients(quantizer, 2.0)
        np.testing.assert_array_equal(to_x, [2, 2, 2, 0])

    def test_binary_kernels_keep_their_gradient(self):
        quantizer = built((4,), 0.5, bits=1, gradient="ewgs", delta=0.7)
        to_x, _ = self.gradients(quantizer, 2.0, [0.3, -0.6, 0.9, 4.0])
        np.testing.assert_allclose(to_x, [2, 2, 2, 0], rtol=1e-6)  # float32

    def test_a_model_trains_with_it_and_loads_again(self, backend, tmp_path):
        layer = layers.QuantizedDense(
            2, kernel_quantizer=LSQ(2, gradient="ewgs", delta=0.5), name="dense"
        )
        model = keras.Sequential([keras.Input((3,)), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=backend == "jax")
        x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
        before = ops.convert_to_numpy(layer.kernel).copy()
        model.fit(x, x[:, :2], verbose=0, epochs=2)
        assert (ops.convert_to_numpy(layer.kernel) != before).any()
        layer.kernel_quantizer.delta.assign(0.25)
        model.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras")
        quantizer = again.get_layer("dense").kernel_quantizer
        assert quantizer.get_config() == layer.kernel_quantizer.get_config()
        assert (quantizer.gradient, float(ops.convert_to_numpy(quantizer.delta))) == ("ewgs", 0.25)
        np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match=r"LSQ: gradient must be one of .*Got 'ewsg'.*'ewgs'"):
            LSQ(gradient="ewsg")
        with pytest.raises(ValueError, match=r"LSQ: delta must be .* at least 0\. Got -1"):
            LSQ(gradient="ewgs", delta=-1)
        assert "delta" not in LSQ(4).get_config()
