"""Pools, padding, slices and reshapes in integers: answers by hand."""

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
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


CODES = np.random.default_rng(3).integers(0, 9, (2, 5, 6, 8)).astype("float32") / 8


@pytest.mark.parametrize(
    ("move", "wanted"),
    [
        (lambda x: x[:, 1:, :-2], CODES[:, 1:, :-2]),
        (lambda x: x[:, 1:4:2, ::3], CODES[:, 1:4:2, ::3]),
        (lambda x: x[..., 2:5], CODES[..., 2:5]),
        (lambda x: x[:, -2:, ..., :3], CODES[:, -2:, ..., :3]),
        (K.Cropping2D(((1, 0), (2, 1))), CODES[:, 1:, 2:-1]),
        (K.Permute((3, 1, 2)), CODES.transpose(0, 3, 1, 2)),
        (lambda x: ops.transpose(x, (0, 2, 1, 3)), CODES.transpose(0, 2, 1, 3)),
    ],
)
def test_crops_and_turns_move_codes(move, wanted):
    """Eighths up to 1 are on any grid that minmax makes of them."""
    inputs = keras.Input(CODES.shape[1:])
    model = keras.Model(inputs, move(copied(inputs)))
    model.get_layer("copy").set_weights([np.eye(8, dtype=np.float32)[None, None]])
    small = calibrate(quantize_model(model), CODES, method="minmax")
    graph = integer_graph(small, batch=2)
    (output,) = graph.outputs
    found = reference.run(graph, {graph.inputs[0]: CODES})[output]
    kept = np.array(ops.convert_to_numpy(small(CODES)))
    np.testing.assert_array_equal(found, kept)
    # Half a code of the input's 0..255, and half a code of the output's -127..127.
    np.testing.assert_allclose(found, wanted, atol=0.5 / 255 + 0.5 / 127)


def shuffle_unit(x):
    """ShuffleNet V2: half of the channels passes, the other is computed; then they are mixed."""
    h, w, c = x.shape[1:]
    left, right = x[..., : c // 2], x[..., c // 2 :]
    right = K.Conv2D(c // 2, 1, activation="relu")(right)
    right = K.DepthwiseConv2D(3, padding="same")(right)
    right = K.Conv2D(c // 2, 1, activation="relu")(right)
    x = K.Concatenate()([left, right])
    return K.Reshape((h, w, c))(K.Permute((1, 2, 4, 3))(K.Reshape((h, w, 2, c // 2))(x)))


def u_net(x):
    """The first U-Net: no padding, so that what is joined is cropped first."""
    y = K.Conv2D(8, 3, activation="relu")(K.MaxPooling2D()(x))
    y = K.UpSampling2D()(y)
    tall, wide = (b - a for a, b in zip(y.shape[1:3], x.shape[1:3], strict=True))
    kept = K.Cropping2D(((tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2)))(x)
    return K.Conv2D(4, 3, activation="relu")(K.Concatenate()([kept, y]))


def space_to_depth(x):
    return K.Concatenate()([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])


@pytest.mark.runtime
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w2a2"])
@pytest.mark.parametrize("block", [shuffle_unit, u_net, space_to_depth])
def test_nets_that_split_turn_and_crop_export_exactly(block, scheme):
    inputs = keras.Input((12, 14, 3))
    x = block(K.Conv2D(8, 3, padding="same", activation="relu")(inputs))
    x = K.Dense(5)(K.GlobalAveragePooling2D()(K.Conv2D(8, 1, activation="relu")(x)))
    images = np.random.default_rng(0).uniform(0, 1, (4, 12, 14, 3)).astype("float32")
    model = calibrate(quantize_model(keras.Model(inputs, x), scheme), images)
    assert tflite_export.convert(model, verify=images).mismatches == 0


def test_images_are_cropped_and_turned_on_their_way_in():
    inputs = keras.Input((12, 14, 3))
    x = K.Rescaling(1 / 127.5, offset=-1.0)(K.Permute((2, 1, 3))(K.Cropping2D(2)(inputs)))
    x = K.GlobalAveragePooling2D()(K.Conv2D(4, 3, activation="relu")(x))
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 14, 3)).astype("uint8")
    model = calibrate(quantize_model(keras.Model(inputs, x), input_range=(0, 255)), images)
    graph = integer_graph(model, batch=4, input_type="uint8")
    found = reference.run(graph, {graph.inputs[0]: images})[graph.outputs[0]]
    np.testing.assert_array_equal(found, np.array(ops.convert_to_numpy(model(images))))


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (lambda x: x[:, 1], r"takes an axis away. Got x\[:, 1\]"),
        (lambda x: x[..., ::2], r"only slices that step forward.* Got x\[\.\.\., ::2\]"),
        (lambda x: ops.transpose(x, (3, 1, 2, 0)), "the first axis counts images"),
    ],
)
def test_moves_of_another_kind_are_refused(move, said):
    inputs = keras.Input((5, 6, 8), batch_size=2)
    x = K.Flatten()(move(copied(inputs)))
    small = calibrate(quantize_model(keras.Model(inputs, x)), CODES)
    with pytest.raises(NotExportable, match=said):
        integer_graph(small, batch=2)
