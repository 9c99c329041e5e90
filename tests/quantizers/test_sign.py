"""Signs: Bi-Real Net's forward pass and its polynomial's derivative."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import callbacks, layers, quantizers
from keras_lowbit.quantizers import Sign
from tests.gradients import gradient


def built(shape=(None, 3)):
    quantizer = Sign()
    quantizer.build(shape)
    return quantizer


def test_codes_are_signs_and_zero_counts_as_positive():
    x = np.array([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0], np.float32)
    codes, scale = built().encode(ops.convert_to_tensor(x))
    assert ops.convert_to_numpy(codes).tolist() == [-1, -1, 1, 1, 1, 1]
    assert ops.convert_to_numpy(scale) == 1


def test_the_gradient_is_that_of_the_papers_polynomial():
    """2 + 2x on [-1, 0), 2 - 2x on [0, 1], 0 outside; times the gradient from above."""
    x = [-1.5, -1.0, -0.75, -0.25, 0.0, 0.25, 0.5, 1.0, 1.25]
    above = np.array([1, 1, 1, -2, 1, 3, 1, 1, 1], np.float32)
    quantizer = built()
    (got,) = gradient(lambda t: ops.sum(quantizer(t) * ops.convert_to_tensor(above)), x)
    assert got.tolist() == [0, 0, 0.5, -2 * 1.5, 2, 3 * 1.5, 1, 0, 0]


def test_the_gradient_is_the_polynomials_finite_difference():
    def polynomial(x):
        inner = np.where(x < 0, 2 * x + x**2, 2 * x - x**2)
        return np.where(np.abs(x) <= 1, inner, np.sign(x))

    x = np.linspace(-1.9, 1.9, 39)
    step = 1e-4
    wanted = (polynomial(x + step) - polynomial(x - step)) / (2 * step)
    quantizer = built()
    (got,) = gradient(lambda t: ops.sum(quantizer(t)), x)
    # A central difference is exact on a parabola; at its joints (-1, 0, 1) half a step is left.
    np.testing.assert_allclose(got, wanted, atol=2 * step)


def test_a_layer_behind_sees_the_gradient_of_the_sign():
    """x = 0.5, code 1, kernel code 1 of scale 2: d/dx = (2 - 1) * 2."""
    layer = layers.QuantizedDense(1, use_bias=False, input_quantizer="sign")
    layer.build((1, 1))
    layer.kernel_quantizer.take_scale(np.float32(2))
    layer.kernel.assign([[2.0]])
    (got,) = gradient(lambda t: ops.sum(layer(t)), [[0.5]])
    assert got.tolist() == [[2.0]]


def test_files_hold_zero_for_minus_one():
    grid = built().grid()
    assert (grid.lo, grid.hi, float(grid.scale), grid.offset) == (0, 1, 2, -1)
    assert grid.zero_point == -128


@pytest.mark.once
class TestRefusals:
    def test_other_widths(self):
        with pytest.raises(ValueError, match=r"Sign: signs take 1 bit. Got 2. Use 'lsq'"):
            quantizers.get("sign", bits=2)
        with pytest.raises(ValueError, match=r"signs take 1 bit. Got 8"):
            built().set_bits(8)

    def test_kernels(self):
        with pytest.raises(ValueError, match="'sign' quantizes activations alone"):
            layers.QuantizedDense(1, kernel_quantizer="sign")

    def test_tensors_without_negative_values(self):
        with pytest.raises(ValueError, match=r"are all 1. Take the ReLU in front away"):
            Sign(signed=False)


@pytest.mark.once
def test_a_descent_passes_signs_by():
    inputs = keras.Input((3,))
    pair = layers.Quantize("sign", bits=1, name="signs")(inputs)
    model = keras.Model(
        inputs, layers.QuantizedDense(2, kernel_quantizer=quantizers.LSQ(2), name="product")(pair)
    )
    descent = callbacks.BitDescent({0: 4})
    descent.set_model(model)
    descent.on_epoch_begin(0)
    assert model.get_layer("signs").quantizer.bits == 1
    assert model.get_layer("product").kernel_quantizer.bits == 4
