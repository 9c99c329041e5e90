"""SAME padding behind signs: -1, the code that files pad with."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.quantizers import LSQ
from tests.gradients import gradient

SAME = {"padding": "same", "use_bias": False, "input_quantizer": "sign"}


def ones(layer, shape):
    """The layer with kernels of code 1 and scale 1."""
    layer.build(shape)
    for part in ("", "depthwise_", "pointwise_"):
        if hasattr(layer, f"{part}kernel"):
            kernel = getattr(layer, f"{part}kernel")
            kernel.assign(np.ones(kernel.shape))
    return layer


def bit(axis=-1):
    return LSQ(1, axis=axis)


def test_a_border_of_minus_ones_stands_around_signs():
    """2 x 2 ones under a 3 x 3 window of ones: 4 inside, 5 of the border: -1."""
    conv = ones(layers.QuantizedConv2D(1, 3, kernel_quantizer=bit(), **SAME), (1, 2, 2, 1))
    got = ops.convert_to_numpy(conv(np.ones((1, 2, 2, 1), np.float32)))
    assert got.ravel().tolist() == [-1, -1, -1, -1]


def test_strides_keep_the_odd_row_after():
    """Width 4, window 3, stride 2: only the last place sees one -1."""
    conv = layers.QuantizedConv2D(1, (1, 3), strides=2, kernel_quantizer=bit(), **SAME)
    got = ops.convert_to_numpy(ones(conv, (1, 1, 4, 1))(np.ones((1, 1, 4, 1), np.float32)))
    assert got.ravel().tolist() == [3, 1]


def test_dilation_widens_the_border():
    """Width 3, window 3 of step 2: two places beside, of three each; the middle sees the ends."""
    conv = layers.QuantizedConv2D(1, (1, 3), dilation_rate=2, kernel_quantizer=bit(), **SAME)
    got = ops.convert_to_numpy(ones(conv, (1, 1, 3, 1))(np.ones((1, 1, 3, 1), np.float32)))
    assert got.ravel().tolist() == [1, -1, 1]


def test_depthwise_and_separable_layers_pad_alike():
    x = np.ones((1, 2, 2, 2), np.float32)
    deep = layers.QuantizedDepthwiseConv2D(3, kernel_quantizer=bit((-2, -1)), **SAME)
    assert np.all(ops.convert_to_numpy(ones(deep, x.shape)(x)) == -1)
    both = layers.QuantizedSeparableConv2D(
        1,
        3,
        depthwise_quantizer=bit((-2, -1)),
        pointwise_quantizer=bit(),
        between_quantizer=None,
        **SAME,
    )
    assert np.all(ops.convert_to_numpy(ones(both, x.shape)(x)) == -2)


def test_the_kernel_feels_the_border():
    """x = 1 at the only place of a 1 x 3 window: the taps beside it multiply -1."""
    conv = layers.QuantizedConv2D(1, (1, 3), kernel_quantizer=None, **SAME)
    ones(conv, (1, 1, 1, 1))
    (got,) = gradient(lambda: ops.sum(conv(ops.ones((1, 1, 1, 1)))), variables=[conv.kernel])
    assert got.ravel().tolist() == [-1, 1, -1]


@pytest.mark.parametrize("strides", [1, 2])
def test_a_border_of_zeros_stays_elsewhere(strides):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype("float32")
    fields = {"strides": strides, "padding": "same", "kernel_quantizer": None}
    plain = layers.QuantizedConv2D(4, 3, **fields)
    given = layers.QuantizedConv2D(4, 3, pad_code=0, **fields)
    for layer in (plain, given):
        layer.build(x.shape)
        layer.kernel.assign(np.arange(108).reshape(3, 3, 3, 4) / 100)
    wanted = ops.conv(x, plain.kernel, strides=strides, padding="same")
    for layer in (plain, given):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(v) for v in (layer(x), wanted)))


def test_a_pair_is_padded_as_the_layer_says():
    inputs = keras.Input((2, 2, 1))
    pair = layers.Quantize("sign", bits=1)(inputs)
    fields = {"padding": "same", "use_bias": False, "kernel_quantizer": bit()}
    made = [
        ones(layers.QuantizedConv2D(1, 3, pad_code=code, **fields), (None, 2, 2, 1))
        for code in (0, -1)
    ]
    model = keras.Model(inputs, [layer(pair) for layer in made])
    zeros, signs = model.predict(np.ones((1, 2, 2, 1)), verbose=0)
    assert (zeros.ravel().tolist(), signs.ravel().tolist()) == ([4] * 4, [-1] * 4)


@pytest.mark.once
class TestArguments:
    def test_a_config_keeps_what_was_given(self):
        given = layers.QuantizedConv2D(1, 3, pad_code=-1)
        assert layers.QuantizedConv2D.from_config(given.get_config()).pad_code == -1
        assert "pad_code" not in layers.QuantizedConv2D(1, 3).get_config()

    def test_other_codes_are_refused(self):
        with pytest.raises(ValueError, match=r"pad_code must be None or one of \(0, -1\). Got 1"):
            layers.QuantizedDepthwiseConv2D(3, pad_code=1)

    def test_strides_need_a_static_size(self):
        layer = layers.QuantizedConv2D(1, 3, strides=2, pad_code=-1, padding="same", name="c")
        dynamic = keras.KerasTensor((None, None, 4, 1))
        with pytest.raises(ValueError, match=r"c: strides \(2, 2\).* need a static image size"):
            layer.padded(dynamic, np.ones((3, 3, 1, 1)))
