"""Pools, padding, slices and reshapes in integers: answers by hand."""

import keras
import numpy as np
import pytest

from keras_lowbit import NotExportable, calibrate, quantize_model, quantizers
from keras_lowbit import layers as quantized_layers
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from tests.exactness.hostile import hostile
from tests.exactness.trained import drifts

K = keras.layers


def copied(x):
    """A 1x1 convolution that computes its input: what follows then has a product before it."""
    return K.Conv2D(x.shape[-1], 1, use_bias=False, name="copy")(x)


def integer_outputs(model, images, scheme="w8a8"):
    """`(outputs of the integer graph, its scale, the graph)` of a model of one `copied`."""
    kernel = np.eye(images.shape[-1], dtype=np.float32)[None, None]
    model.get_layer("copy").set_weights([kernel])
    graph = integer_graph(calibrate(quantize_model(model, scheme), images))
    values = reference.run(graph, {graph.inputs[0]: images})
    (last,) = (op for op in graph if op.output == graph.outputs[0])
    return values[graph.outputs[0]], graph.tensors[last.inputs[0]].scale, graph


def row(*values):
    return np.array(values, np.float32).reshape(1, 1, -1, 1)


@pytest.mark.parametrize(
    ("values", "relu", "expected"),
    [
        ((1.0, 0.0, 0.25), False, (0.5, 0.25)),  # the result's grid ends at 0.5, the mean's at 1
        ((-1.0, 0.5, 0.25), True, (0.0, 0.25)),  # relu of the mean, not the mean of relus
    ],
)
def test_a_padded_average_pool_takes_its_mean_on_the_grid_of_its_input(values, relu, expected):
    """Windows (a, b) and (c, border), padding not counted."""
    inputs = keras.Input((1, 3, 1))
    x = K.AveragePooling2D((1, 2), padding="same")(copied(inputs))
    model = keras.Model(inputs, K.ReLU()(x) if relu else x)
    found, scale, graph = integer_outputs(model, row(*values))
    assert "average_pool_2d" in [op.kind for op in graph]
    # One rounding to the input's grid, of steps up to 1.5 / 255, and one to the output's.
    np.testing.assert_allclose(found.reshape(-1), expected, atol=0.75 / 255 + scale / 2)


@pytest.mark.parametrize(
    ("quantizer", "values"),
    [
        (quantizers.LSQ(2, signed=False, role="activation"), (0, 3, 2)),  # 1.5: no code of 0..3
        (quantizers.Sign(), (-1, 1, 1)),  # 0: no sign
    ],
)
def test_a_padded_average_pool_of_few_codes_keeps_the_digits_of_its_mean(quantizer, values):
    inputs = keras.Input((1, 3, 1))
    x = quantized_layers.Quantize("affine")(inputs)
    x = quantized_layers.QuantizedConv2D(1, 1, kernel_quantizer="lsq", name="copy")(x)
    x = quantized_layers.Dequantize()(quantized_layers.Quantize(quantizer)(x))
    x = quantized_layers.AveragePooling2D((1, 2), padding="same")(x)
    x = quantized_layers.Dequantize()(quantized_layers.Quantize("lsq", bits=8)(x))
    model = keras.Model(inputs, x)
    model.get_layer("copy").kernel.assign(np.ones((1, 1, 1, 1)))
    calibrate(model, row(*values))
    if quantizer.bits == 2:
        quantizer.scale.assign(1.0)
    graph = integer_graph(model)
    found = reference.run(graph, {graph.inputs[0]: row(*values)})[graph.outputs[0]]
    expected = [np.mean(values[:2]), values[2]]
    np.testing.assert_allclose(found.reshape(-1), expected, atol=0.02)  # two steps of 8 bits


@pytest.mark.parametrize(
    "layer",
    [
        K.Flatten,
        lambda **options: K.MaxPooling2D(2, **options),
        lambda **options: K.AveragePooling2D(2, **options),
        lambda **options: K.AveragePooling2D(3, padding="same", **options),
        K.GlobalMaxPooling2D,
        K.GlobalAveragePooling2D,
        K.ZeroPadding2D,
        K.UpSampling2D,
    ],
)
def test_channels_that_come_first_are_refused_by_name(layer):
    inputs = keras.Input((4, 6, 8))
    x = layer(data_format="channels_first", name="turned")(copied(inputs))
    model = keras.Model(inputs, K.Dense(2)(x if len(x.shape) == 2 else K.Flatten()(x)))
    small = calibrate(quantize_model(model), np.ones((1, 4, 6, 8), np.float32))
    with pytest.raises(NotExportable, match="turned: data_format='channels_first' has no integer"):
        integer_graph(small)


def test_a_row_has_its_channels_in_any_layout():
    inputs = keras.Input((1, 3, 1))
    x = K.Flatten()(copied(inputs))
    model = keras.Model(inputs, K.Flatten(data_format="channels_first")(x))
    found, scale, _ = integer_outputs(model, row(1.0, 0.0, 0.25))
    # One code: half for each of two grids.
    np.testing.assert_allclose(found, [[1.0, 0.0, 0.25]], atol=scale)


# --- copies of what is no image -------------------------------------------------------------------


def flat_added(x):
    """Sums sit on 8 bits; the dense layer in the middle wants four."""
    x = K.Flatten()(K.Add()([x, K.Conv2D(8, 1)(x)]))
    return K.Dense(2)(K.Dense(3, name="middle")(x))


def normalized(x):
    return K.Dense(2)(K.BatchNormalization()(K.ReLU()(K.Flatten()(x))))


def activated(x):
    return K.Dense(2)(K.ReLU()(K.Flatten()(K.Add()([x, K.Conv2D(8, 1)(x)]))))


def normalized_mean(x):
    return K.Dense(2)(K.BatchNormalization()(K.GlobalAveragePooling2D()(K.Conv2D(80, 1)(x))))


def normalized_in_three_axes(x):
    return K.Dense(2)(K.Flatten()(K.BatchNormalization()(K.Reshape((4, 72))(K.ReLU()(x)))))


@pytest.mark.parametrize(
    ("end", "largest"),
    [
        (flat_added, 288 * 3),  # the dense layer's own kernel
        (normalized, 288 * 2),
        (activated, 288 * 2),
        (normalized_mean, 36 * 80),  # the mean itself
        (normalized_in_three_axes, 288 * 2),
    ],
)
def test_a_copy_of_a_row_needs_no_unit_matrix(end, largest):
    """288 numbers: a unit matrix of them would hold 82,944."""
    inputs = keras.Input((6, 6, 3))
    model = hostile(keras.Model(inputs, end(K.Conv2D(8, 3, padding="same")(inputs))), seed=1)
    images = np.random.default_rng(0).random((4, 6, 6, 3), np.float32)
    small = calibrate(quantize_model(model, "w4a4"), images)
    graph = integer_graph(small)
    assert max(op.kernel.size for op in graph if hasattr(op, "kernel")) == largest
    found = drifts(small, [images])
    assert found
    assert {name: drift for name, drift in found.items() if drift.far} == {}
