"""Products of codes: integers forward, and the gradients of products of values backward."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import LSQ
from tests.gradients import gradient


def activation(bits=4, **options):
    return LSQ(bits, role="activation", **options)


def dense():
    layer = layers.QuantizedDense(4, kernel_quantizer=LSQ(3, axis=-1), input_quantizer=activation())
    return layer, (2, 5), lambda x, k: ops.matmul(x, k)


def conv():
    layer = layers.QuantizedConv2D(
        4,
        3,
        strides=2,
        padding="same",
        kernel_quantizer=LSQ(2, axis=-1),
        input_quantizer=activation(signed=False),
    )
    return layer, (2, 7, 5, 3), lambda x, k: ops.conv(x, k, strides=2, padding="same")


def grouped_conv():
    layer = layers.QuantizedConv2D(
        4, 3, groups=2, dilation_rate=2, kernel_quantizer=LSQ(4), input_quantizer=activation(8)
    )
    return layer, (2, 7, 7, 6), lambda x, k: ops.conv(x, k, dilation_rate=2)


def depthwise():
    layer = layers.QuantizedDepthwiseConv2D(
        3,
        depth_multiplier=2,
        kernel_quantizer=LSQ(4, axis=(-2, -1)),
        input_quantizer=activation(),
    )
    return layer, (2, 5, 5, 3), lambda x, k: ops.depthwise_conv(x, k)


every_product = pytest.mark.parametrize("make", [dense, conv, grouped_conv, depthwise])


def built(make):
    """A layer with scales that clip some values, its input and its plain product."""
    layer, shape, product = make()
    layer.build(shape)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    layer.input_quantizer.fit_scale(0.5 * x, "minmax")
    kernel = rng.normal(size=layer.kernel.shape).astype(np.float32)
    layer.kernel.assign(kernel)
    layer.kernel_quantizer.fit_scale(0.7 * kernel, "minmax")
    return layer, x, kernel, product


def value(x, quantizer):
    """The value form of LSQ, with one multiplication by a scale that keeps its gradient."""
    lo, hi = quantizer.static_bounds()
    scale = ops.convert_to_tensor(quantizer.scale)
    stop = ops.stop_gradient
    n = np.prod(x.shape if quantizer.role == "kernel" else x.shape[1:])
    # Esser et al., section 2.2: g forward 1, backward 1 / sqrt(N hi); 8 bits: tests of LSQ.
    damping = float(1 / np.sqrt(n * hi)) * (7 / 127 if quantizer.bits == 8 else 1) ** 2
    damped = stop(scale) + (scale - stop(scale)) * damping
    ratio = x / damped
    inside = ops.cast((stop(ratio) >= lo - 0.5) & (stop(ratio) <= hi + 0.5), "float32")
    code = ops.round(ops.clip(stop(ratio), lo, hi))
    straight = code + inside * (ratio - stop(ratio))
    return straight * damped


@every_product
def test_gradients_are_those_of_the_product_of_values(make):
    layer, x, kernel, product = built(make)
    probe = np.random.default_rng(1).normal(size=ops.shape(layer(x)))
    probe = ops.convert_to_tensor(probe.astype(np.float32))
    scales = [layer.input_quantizer.scale, layer.kernel_quantizer.scale]
    got = gradient(lambda t: ops.sum(layer(t) * probe), x, variables=[layer.kernel, *scales])

    def on_values(x, kernel):
        outputs = product(value(x, layer.input_quantizer), value(kernel, layer.kernel_quantizer))
        return ops.sum(outputs * probe)

    want = gradient(on_values, x, kernel, variables=scales)
    for g, w in zip(got, want, strict=True):
        assert np.abs(w).max() > 1e-3
        # Float32 sums in another order.
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * np.abs(w).max())


@every_product
def test_the_forward_pass_is_a_sum_of_integers_times_one_scale(make):
    layer, x, kernel, product = built(make)
    codes, scale = layer.input_quantizer.encode(ops.convert_to_tensor(x))
    kernel_codes, kernel_scale = layer.kernel_quantizer.encode(ops.convert_to_tensor(kernel))
    sums = ops.convert_to_numpy(product(codes, kernel_codes))
    np.testing.assert_array_equal(sums, np.rint(sums))
    unit = ops.convert_to_numpy(scale) * ops.convert_to_numpy(kernel_scale).reshape(-1)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), sums * unit)


def test_where_everything_saturates_scales_get_the_finite_difference():
    """x = (9, -9), codes (7, -7); kernel (9, -9), codes (3, -4): y = s_x s_k (21 + 28)."""
    layer = layers.QuantizedDense(1, kernel_quantizer=LSQ(3), input_quantizer=activation())
    layer.build((1, 2))
    layer.kernel.assign(np.float32([[9.0], [-9.0]]))
    layer.input_quantizer.scale.assign(0.5)
    layer.kernel_quantizer.scale.assign(0.25)
    scales = [layer.input_quantizer.scale, layer.kernel_quantizer.scale]
    to_x, to_s_x, to_s_k = gradient(lambda t: ops.sum(layer(t)), [[9.0, -9.0]], variables=scales)
    np.testing.assert_array_equal(to_x, [[0, 0]])
    # dy/ds_x = 49 s_k, damped by 1 / sqrt(2 * 7); dy/ds_k = 49 s_x, damped by 1 / sqrt(2 * 3)
    np.testing.assert_allclose(to_s_x, 49 * 0.25 / np.sqrt(14), rtol=1e-5)
    np.testing.assert_allclose(to_s_k, 49 * 0.5 / np.sqrt(6), rtol=1e-5)  # float32


def test_readers_of_one_pair_add_their_gradients():
    """y = 2 v + 3 v for a value v = s * code: five times the gradient of the value."""
    quantize, dequantize = layers.Quantize(activation()), layers.Dequantize()
    first, second = (layers.QuantizedDense(1, kernel_quantizer=None) for _ in range(2))
    pair = quantize(np.float32([[0.6]]))
    first(pair), second(pair)
    first.kernel.assign([[2.0]])
    second.kernel.assign([[3.0]])
    scale = quantize.quantizer.scale
    scale.assign(0.5)

    def both(x):
        pair = quantize(x)
        return ops.sum(first(pair) + second(pair))

    got = gradient(both, [[0.6]], variables=[scale])
    one = gradient(lambda x: ops.sum(dequantize(quantize(x))), [[0.6]], variables=[scale])
    for g, w in zip(got, one, strict=True):
        np.testing.assert_allclose(g, 5 * w, rtol=1e-6)  # float32 sums
    np.testing.assert_allclose(one[1], -0.2 / np.sqrt(7), rtol=1e-5)  # code 1, ratio 1.2


def test_mixed_precision_leaves_the_sums_exact():
    layer, x, *_ = built(conv)
    want = ops.convert_to_numpy(layer(x))
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        other = keras.layers.deserialize(keras.layers.serialize(layer))
        inputs = keras.Input(x.shape[1:], dtype="float32")
        model = keras.Model(inputs, other(inputs))
        other.set_weights(layer.get_weights())
        got = model(ops.convert_to_tensor(x))
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_array_equal(ops.convert_to_numpy(got), want)
