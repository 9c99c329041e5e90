import keras
import numpy as np
from keras import ops

from keras_lowbit import layers
from keras_lowbit.analysis import integer_weights
from keras_lowbit.transform import quantize_model

K = keras.layers


def net():
    x = inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(6, 3, use_bias=False, name="conv")(x)
    x = K.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(x)
    x = K.SeparableConv2D(5, (2, 1), name="sep")(x)
    x = K.Flatten()(x)
    return keras.Model(inputs, K.Dense(4, name="dense")(x))


def quantized_kernels(model):
    """`{name: what the layer multiplies with, in reals}`."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, layers.QuantizedSeparableConv2D):
            found[f"{layer.name}/depthwise"] = layer.depthwise_quantizer(layer.depthwise_kernel)
            found[f"{layer.name}/pointwise"] = layer.pointwise_quantizer(layer.pointwise_kernel)
        elif hasattr(layer, "kernel_quantizer"):
            found[layer.name] = layer.kernel_quantizer(layer.kernel)
    return {name: ops.convert_to_numpy(kernel) for name, kernel in found.items()}


def test_codes_times_scale_is_the_quantized_kernel_exactly():
    for bits in (1, 2, 4, 8):
        for per_channel in (True, False):
            scheme = {"kernel_bits": bits, "ends_bits": None, "per_channel": per_channel}
            model = quantize_model(net(), scheme)
            found, expected = integer_weights(model), quantized_kernels(model)
            assert list(found) == ["conv", "dw", "sep/depthwise", "sep/pointwise", "dense"]
            assert set(expected) == set(found)
            for name, made in found.items():
                assert (made.codes.dtype, made.scale.dtype) == (np.int8, np.float32)
                assert made.bits == bits
                assert len(np.unique(made.codes)) <= 2**bits
                np.testing.assert_array_equal(made.codes * made.scale, expected[name])


def test_shapes_are_those_of_the_kernels():
    found = integer_weights(quantize_model(net(), "w4a4"))
    shapes = {name: (made.codes.shape, made.scale.shape) for name, made in found.items()}
    assert shapes == {
        "conv": ((3, 3, 3, 6), (6,)),
        "dw": ((3, 3, 6, 2), (6, 2)),
        "sep/depthwise": ((2, 1, 12, 1), (12, 1)),
        "sep/pointwise": ((1, 1, 12, 5), (5,)),
        "dense": ((2 * 1 * 5, 4), (4,)),
    }


def test_the_bias_belongs_to_the_last_product():
    model = quantize_model(net(), "w4a4")
    model.get_layer("sep").bias.assign([1, 2, 3, 4, 5])
    found = integer_weights(model)
    assert found["conv"].bias is None
    assert found["sep/depthwise"].bias is None
    np.testing.assert_array_equal(found["sep/pointwise"].bias, [1, 2, 3, 4, 5])


def test_codes_worked_by_hand():
    # Grid of 2 bits, scale 0.5: 0.3 / 0.5 -> 1, -0.2 -> 0 (-0.4 rounds to 0), -5 clips to -2.
    inputs = keras.Input((3,))
    layer = layers.QuantizedDense(1, name="d", use_bias=False)
    layer.kernel_quantizer.set_bits(2)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign([[0.3], [-0.2], [-5.0]])
    layer.kernel_quantizer.scale.assign([0.5])
    made = integer_weights(model)["d"]
    assert made.codes.tolist() == [[1], [0], [-2]]
    assert (made.bits, made.bias) == (2, None)


def test_nested_shared_and_float_layers():
    shared = layers.QuantizedDense(3, name="shared")
    inner_in = keras.Input((3,))
    inner = keras.Model(inner_in, shared(shared(inner_in)), name="inner")
    inputs = keras.Input((3,))
    x = layers.QuantizedDense(2, kernel_quantizer=None, name="reals")(shared(inner(inputs)))
    model = keras.Model(inputs, K.Dense(1, name="plain")(x))
    assert list(integer_weights(model)) == ["inner/shared"]
