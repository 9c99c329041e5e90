"""Average pools: the same means on every backend, and in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import NotExportable, calibrate, layers, quantize_model
from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.numerics.windows import same_padding
from keras_lowbit.quantizers.sites import sites_of
from tests.gradients import gradient


def row(values):
    return np.array(values, np.float32).reshape(1, 1, -1, 1)


@pytest.mark.parametrize(
    ("size", "pool", "stride", "expected"),
    [
        (5, 3, 3, [1.0, 3.5]),  # windows 0 1 2 and 3 4: one position behind is padding
        (4, 3, 2, [1.0, 2.5]),  # 0 1 2 and 2 3
        (4, 3, 1, [0.5, 1.0, 2.0, 2.5]),  # as much padding on both sides
        (4, 4, 1, [1.0, 1.5, 2.0, 2.5]),  # 0 1 2, 0 1 2 3, 1 2 3 and 2 3
        (4, 2, 2, [0.5, 2.5]),  # no padding
    ],
)
def test_a_window_over_the_border_takes_the_mean_of_what_it_sees(size, pool, stride, expected):
    layer = layers.AveragePooling2D((1, pool), (1, stride), padding="same")
    found = ops.convert_to_numpy(layer(row(range(size)))).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32


def test_without_padding_it_is_the_layer_of_keras():
    x = np.random.default_rng(0).random((2, 5, 6, 3), np.float32)
    ours = layers.AveragePooling2D(2, padding="valid")(x)
    theirs = keras.layers.AveragePooling2D(2, padding="valid")(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


def test_a_quantized_model_pools_so():
    inputs = keras.Input((5, 5, 2))
    x = keras.layers.AveragePooling2D(3, padding="same", name="pool")(
        keras.layers.Conv2D(2, 1)(inputs)
    )
    small = quantize_model(keras.Model(inputs, x))
    assert type(small.get_layer("pool")) is layers.AveragePooling2D


def test_a_pool_that_repeats_the_border_is_refused_by_name(backend):
    if backend != "torch":
        pytest.skip("the other backends do not")
    inputs = keras.Input((5, 5, 2))
    small = quantize_model(keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs)))
    x = ops.average_pool(small.output, 3, 3, "same")
    by_hand = keras.Model(small.input, keras.layers.Flatten()(x))
    calibrate(by_hand, np.ones((1, 5, 5, 2), np.float32))
    with pytest.raises(NotExportable, match=r"average_pool: on PyTorch .*layers.AveragePooling2D"):
        integer_graph(by_hand)


@pytest.mark.parametrize(
    ("zero_point", "codes", "expected"),
    [
        # Windows of two see 1 and 2, 2 and 4, then 4 alone.
        (0, [1, 2, 4], [2, 3, 4]),  # 1.5 away from zero
        (0, [-1, -2, -4], [-2, -3, -4]),
        (-128, [1, 2, 4], [1, 3, 4]),  # int8 -127 and -126: -126.5 away from zero is -127
        (-128, [129, 130, 132], [130, 131, 132]),  # int8 1 and 2
    ],
)
def test_means_of_codes_round_as_the_runtime_rounds_int8(zero_point, codes, expected):
    layer = layers.AveragePooling2D((1, 2), 1, padding="same", zero_point=zero_point)
    found = ops.convert_to_numpy(layer(row(codes))).reshape(-1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("zero_point", [0, -128])
def test_reals_of_a_quantizer_that_looks_on_are_not_rounded(zero_point):
    layer = layers.AveragePooling2D((1, 2), 1, padding="same", zero_point=zero_point)
    found = ops.convert_to_numpy(layer(row([0.2, 0.25, 0.0]))).reshape(-1)
    np.testing.assert_allclose(found, [0.225, 0.125, 0.0], rtol=1e-6)  # float32


def padded_pool(relu):
    """A pool over the border between convolutions, outputs well below 1.0."""
    inputs = keras.Input((7, 6, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu" if relu else None)(inputs)
    x = keras.layers.AveragePooling2D(3, strides=1, padding="same", name="pool")(0.1 * x)
    x = keras.layers.Conv2D(8, 1, activation="relu", name="after")(x)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("relu", [False, True])
def test_scales_behind_a_padded_pool_are_those_of_the_float_model(relu):
    model = padded_pool(relu)
    images = np.random.default_rng(0).normal(size=(64, 7, 6, 3)).astype("float32")
    small = calibrate(quantize_model(model, "w8a8"), images, method="minmax")
    behind = keras.Model(model.inputs, model.get_layer("after").output)
    largest = behind.predict(images, verbose=0).max()
    scale = ops.convert_to_numpy(small.get_layer("after_quantize").quantizer.scale)
    np.testing.assert_allclose(scale * 255, largest, rtol=0.02)  # kernels of 8 bits


def test_a_padded_pool_of_a_model_switched_off_pools_reals():
    model = padded_pool(True)
    images = np.random.default_rng(0).normal(size=(8, 7, 6, 3)).astype("float32")
    small = calibrate(quantize_model(model, "w8a8"), images)
    quantizers = [site.quantizer for site in sites_of(small)]
    add_switches(small, quantizers)
    for quantizer in quantizers:
        quantizer.set_enabled(False)
    wanted, got = (m.predict(images, verbose=0) for m in (model, small))
    # float32, summed in another order
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_rounding_passes_the_gradient_of_the_means_on():
    layer = layers.AveragePooling2D((1, 2), 1, padding="same", zero_point=0)
    weights = ops.convert_to_tensor(row([1.0, 10.0, 100.0]))
    (grad,) = gradient(lambda x: ops.sum(layer(x) * weights), row([1, 2, 4]))
    # The first window takes half of two codes, the last all of one.
    np.testing.assert_allclose(grad.reshape(-1), [0.5, 5.5, 105.0], rtol=1e-6)  # float32


@pytest.mark.parametrize("zero_point", [1, -127, True])
def test_other_zero_points_are_refused(zero_point):
    with pytest.raises(ValueError, match="zero_point must be 0, -128 or None"):
        layers.AveragePooling2D(2, zero_point=zero_point)


def test_a_pool_of_codes_needs_a_size():
    layer = layers.AveragePooling2D(2, padding="same", zero_point=0)
    with pytest.raises(ValueError, match="known image size"):
        layer(keras.Input((None, None, 2)))


def test_its_configuration_makes_the_same_layer():
    layer = layers.AveragePooling2D(3, 1, padding="same", zero_point=-128)
    again = layers.AveragePooling2D.from_config(layer.get_config())
    assert (again.zero_point, again.pool_size, again.strides) == (-128, (3, 3), (1, 1))
    assert "zero_point" not in layers.AveragePooling2D(3).get_config()


@pytest.mark.parametrize("relu", [False, True])
def test_the_trained_model_pools_to_the_codes_of_the_file(relu):
    inputs = keras.Input((7, 6, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu" if relu else None)(inputs)
    x = keras.layers.AveragePooling2D(3, strides=1, padding="same", name="pool")(x)
    x = keras.layers.Conv2D(8, 1, name="after")(x)
    small = quantize_model(keras.Model(inputs, x), "w4a4", input_range=(0, 1))
    assert small.get_layer("pool").zero_point == (-128 if relu else 0)
    images = np.random.default_rng(0).integers(0, 256, (64, 7, 6, 3)).astype("float32") / 255
    calibrate(small, images)
    graph = integer_graph(small)
    codes = reference.run(graph, dict.fromkeys(graph.inputs, images))
    pool = next(op.output for op in graph if op.kind == "average_pool_2d")
    source = next(op.inputs[0] for op in graph if op.kind == "average_pool_2d")
    layer = small.get_layer("pool")
    zero = graph.tensors[pool].zero_point
    means = ops.convert_to_numpy(layer(codes[source].astype("float32") - zero))
    np.testing.assert_array_equal(means, codes[pool].astype("float32") - zero)


@pytest.mark.parametrize(
    ("scaled", "input_range", "span"),
    [
        (None, None, (-2.0, 3.0)),  # known after calibration only
        (None, None, (0.0, 255.0)),
        (None, (0, 1), (0.0, 1.0)),
        (None, (-1, 1), (-1.0, 1.0)),  # 0.0 lies between two codes
        ((1 / 127.5, -1.0), None, (0.0, 255.0)),
        ((1.0, -128.0), None, (0.0, 255.0)),
        ((1.0, -100.0), None, (0.0, 255.0)),  # int8 code -28 is 0.0
    ],
)
def test_images_are_pooled_to_the_codes_of_the_file(scaled, input_range, span):
    """Half of the outputs were other codes, up to three steps away."""
    inputs = keras.Input((7, 6, 3))
    x = keras.layers.Rescaling(*scaled)(inputs) if scaled else inputs
    x = keras.layers.AveragePooling2D(3, strides=1, padding="same", name="pool")(x)
    x = keras.layers.Conv2D(8, 3, padding="same", name="after")(x)
    small = quantize_model(keras.Model(inputs, x), "w8a8", input_range=input_range)
    low, high = span
    pixels = np.random.default_rng(0).integers(0, 256, (64, 7, 6, 3))
    images = (low + pixels * (high - low) / 255).astype("float32")
    calibrate(small, images)
    graph = integer_graph(small)
    takes_pixels = graph.tensors[graph.inputs[0]].dtype == "uint8"
    given = pixels.astype("uint8") if takes_pixels else images
    codes = reference.run(graph, dict.fromkeys(graph.inputs, given))
    assert sum(op.kind == "average_pool_2d" for op in graph) == 1
    found = ops.convert_to_numpy(small(images))
    output = graph.tensors[graph.outputs[0]]
    last = graph.ops[-1].inputs[0] if output.scale is None else graph.outputs[0]
    grid = graph.tensors[last]
    wanted = (codes[last].astype("float64") - grid.zero_point) * grid.scale
    steps = np.abs(found - wanted) / grid.scale
    # Ties of the product's rounding may fall to the other side in float32.
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 2e-3


@pytest.mark.parametrize("scaled", [(1 / 255, 0.0), (1 / 255, 0.5), (1 / 127.5, -1.0)])
@pytest.mark.parametrize("between", [None, "max", "relu"])
def test_pools_of_images_in_a_row_keep_one_zero_point(scaled, between):
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Rescaling(*scaled)(inputs)
    x = keras.layers.AveragePooling2D(3, 2, padding="same")(x)
    if between == "max":
        x = keras.layers.MaxPooling2D(2, 1, padding="same")(x)
    if between == "relu":
        x = keras.layers.ReLU()(x)
    x = keras.layers.AveragePooling2D(3, 2, padding="same")(x)
    small = quantize_model(keras.Model(inputs, keras.layers.Conv2D(4, 1)(x)), "w8a8")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 9, 9, 3))
    calibrate(small, pixels.astype("float32"))
    graph = integer_graph(small)
    given = pixels.astype(graph.tensors[graph.inputs[0]].dtype)
    codes = reference.run(graph, dict.fromkeys(graph.inputs, given))
    pools = [op for op in graph if op.kind == "average_pool_2d"]
    assert len(pools) == 2
    last = graph.ops[-1].inputs[0]
    grid = graph.tensors[last]
    wanted = (codes[last].astype("float64") - grid.zero_point) * grid.scale
    found = ops.convert_to_numpy(small(pixels.astype("float32")))
    # Ties of the product's rounding may fall to the other side in float32.
    assert (np.abs(found - wanted) > 0.5 * grid.scale).mean() < 5e-3


@pytest.mark.parametrize(("pool", "strides"), [(2, 2), (2, 3), (3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("zero_point", [0, -128])
def test_compiled_graphs_make_the_codes_of_integers(pool, strides, zero_point):
    """TensorFlow's graph optimizer moved ties of a mean to the other side: every fifth code."""
    codes = np.random.default_rng(0).integers(-127, 128, (2, 9, 7, 3))
    inputs = keras.Input((9, 7, 3))
    layer = layers.AveragePooling2D(pool, strides, padding="same", zero_point=zero_point)
    model = keras.Model(inputs, layer(inputs))
    shifted = codes - zero_point if zero_point else codes
    found = model.predict(shifted.astype("float32"), verbose=0)
    pads = [same_padding(n, pool, strides) for n in (9, 7)]
    for y, x in np.ndindex(found.shape[1:3]):
        (top, left), (up, beside) = (y * strides, x * strides), (pads[0][0], pads[1][0])
        rows = slice(max(top - up, 0), top - up + pool)
        columns = slice(max(left - beside, 0), left - beside + pool)
        seen = codes[:, rows, columns].reshape(2, -1, 3)
        total, count = seen.sum(axis=1), seen.shape[1]
        # Half away from zero, in whole numbers.
        raw = np.sign(total) * ((2 * np.abs(total) + count) // (2 * count))
        np.testing.assert_array_equal(found[:, y, x], raw - zero_point if zero_point else raw)
