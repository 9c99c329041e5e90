"""Images on a grid beside 0.0: whoever reads the codes gets the offset back."""

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.transform import calibrate, quantize_model
from tests.transform.nearness import rounding_noise

K = keras.layers
SHAPE = (8, 8, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype("float32")


def conv(name="conv", **options):
    return K.Conv2D(3, 3, name=name, **{"padding": "same", **options})


def skip(x):
    return K.Add(name="sum")([x, conv()(x)])


def side(x):
    return K.Concatenate(name="cat")([x, conv()(x)])


def batch_norm(x):
    norm = K.BatchNormalization(name="bn")
    y = conv(padding="valid")(norm(x))
    moments = [[2.0, 1.0, 0.5], [0.0, 1.0, 2.0], [5.0, 1.0, 0.5], [4.0, 1.0, 9.0]]
    norm.set_weights(list(np.float32(moments)))
    return y


def average(x):
    return conv()(K.AveragePooling2D(2, name="pool")(x))


def padded(x):
    return conv(padding="valid")(K.ZeroPadding2D(1, name="pad")(x))


def maximum(x):
    return conv(padding="valid")(K.MaxPooling2D(2, name="max")(x))


def shared(x):
    layer = conv("shared")
    return layer(K.ReLU(name="relu")(layer(x)))


def gated(x):
    return conv()(K.Activation("silu", name="silu")(x))


def same(x):
    return conv()(x)


BODIES = [same, skip, side, batch_norm, average, padded, maximum, shared, gated]
# 0.0 between two codes, below them twice, and on one.
SCALINGS = [(1 / 127.5, -1.0), (1 / 255, 0.5), (10 / 255, 10.0), (1 / 255, 0.0)]


def model_of(body, scaling=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input(SHAPE, name="image")
    x = inputs if scaling is None else K.Rescaling(*scaling, name="rescale")(inputs)
    x = K.Flatten(name="flat")(conv("last", strides=2)(K.ReLU(name="out")(body(x))))
    return keras.Model(inputs, x)


def assert_close(model, data, **options):
    """Within the noise of all roundings, at twice that behind the batch norm.

    There values of 0..1 become 0..1 - 5, and a kernel's error is a share of the 5.
    """
    noise = 2 if "bn" in {layer.name for layer in model.layers} else 1
    quantized = calibrate(quantize_model(model, "w8a8", **options), data)
    wanted = model.predict(data, verbose=0)
    made = quantized.predict(data, verbose=0)
    np.testing.assert_allclose(made, wanted, atol=noise * rounding_noise(quantized, wanted))
    return quantized


CASES = [(body, scaling) for scaling in SCALINGS for body in BODIES]


@pytest.mark.parametrize(("body", "scaling"), CASES)
def test_every_reader_of_a_rescaled_image_sees_its_reals(body, scaling):
    quantized = assert_close(model_of(body, scaling), PIXELS)
    graph = integer_graph(quantized, input_type="uint8")
    made = reference.run(graph, {graph.inputs[0]: PIXELS.astype("uint8")})[graph.outputs[0]]
    wanted = quantized.predict(PIXELS, verbose=0)
    # A code of the image that falls on the other side of a tie moves a sum by little.
    assert np.abs(made - wanted).max() <= 3.01 * graph.tensors[graph.ops[-1].inputs[0]].scale


@pytest.mark.parametrize("body", [skip, side, batch_norm, padded, shared])
def test_every_reader_of_an_image_with_a_given_range_sees_its_reals(body):
    data = PIXELS / np.float32(25.5) + 10
    assert_close(model_of(body), data, input_range=(10, 20))


def test_a_float_stem_sees_the_reals():
    model = model_of(same, (1 / 255, 0.5))
    quantized = calibrate(quantize_model(model, {"*": "w8a8", "conv": None}), PIXELS)
    wanted = model.predict(PIXELS, verbose=0)
    np.testing.assert_allclose(
        quantized.predict(PIXELS, verbose=0), wanted, atol=rounding_noise(quantized, wanted)
    )


def test_one_layer_on_two_images_of_other_ranges():
    first, second = keras.Input(SHAPE, name="first"), keras.Input(SHAPE, name="second")
    layer = conv("shared", padding="valid")
    x = K.Concatenate()(
        [layer(K.Rescaling(1 / 255)(first)), layer(K.Rescaling(1 / 255, 1)(second))]
    )
    model = keras.Model([first, second], K.Conv2D(2, 1, name="last")(x))
    assert_close(model, [PIXELS, PIXELS[::-1].copy()])


@pytest.mark.runtime
@pytest.mark.parametrize("body", [skip, side, padded])
def test_the_file_is_exact(body):
    quantized = assert_close(model_of(body, (1 / 127.5, -1.0)), PIXELS)
    result = tflite_export.convert(quantized, verify=PIXELS.astype("uint8"))
    assert result.mismatches == 0


def test_the_offset_is_kept_in_files(tmp_path):
    quantized = assert_close(model_of(skip, (1 / 127.5, -1.0)), PIXELS)
    quantized.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        loaded.predict(PIXELS, verbose=0), quantized.predict(PIXELS, verbose=0)
    )


RANGES = [
    ((2.0, -1.0), (0, 1)),
    ((255.0, 0.0), (0, 1)),
    ((0.5, 0.5), (-1, 1)),
    ((1.0, -0.5), (0, 1)),
]


@pytest.mark.parametrize(("scaling", "ends"), RANGES)
def test_a_rescaling_of_images_that_are_no_pixels(scaling, ends):
    """The grid is that of `gain * x + shift` for the range of `x`: 256 values keep 256 codes."""
    data = (PIXELS / np.float32(255) * (ends[1] - ends[0]) + ends[0]).astype("float32")
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, conv(padding="valid")(K.Rescaling(*scaling)(inputs)))
    quantized = assert_close(model, data, input_range=ends)
    graph = integer_graph(quantized, input_type="uint8")
    made = reference.run(graph, {graph.inputs[0]: PIXELS.astype("uint8")})[graph.outputs[0]]
    step = graph.tensors[graph.ops[-1].inputs[0]].scale
    # Exact but for ties of images that float32 cannot hold.
    apart = np.abs(made - quantized.predict(data, verbose=0)) / step
    assert apart.max() <= 1.01
    assert (apart > 0.5).mean() < 0.02


@pytest.mark.parametrize("scaling", [(2.0, -1.0), (1 / 127.5, -1.0)])
def test_images_that_are_not_of_the_grids_range_are_refused(scaling):
    inputs = keras.Input(SHAPE)
    model = quantize_model(keras.Model(inputs, conv()(K.Rescaling(*scaling)(inputs))), "w8a8")
    with pytest.raises(ValueError, match=r"images span .* of 256.*input_range=\(0, 1\)"):
        calibrate(model, PIXELS / 255)
    near = quantize_model(keras.Model(inputs, conv()(inputs)), "w8a8", input_range=(0, 1))
    with pytest.raises(ValueError, match=r"images span 6\.5e\+04 codes of a grid of 256"):
        calibrate(near, PIXELS)


@pytest.mark.parametrize(
    "move",
    [
        K.ZeroPadding2D(1),
        K.Reshape(SHAPE),
        K.MaxPooling2D(2),
        K.UpSampling2D(2),
        lambda x: x[:, ::2, ::2],
    ],
)
def test_pixels_that_move_before_they_are_rescaled_keep_the_offset(move):
    """The file's codes are the trained model's; half a code of the image was lost."""
    inputs = keras.Input(SHAPE)
    x = K.Rescaling(1 / 127.5, -1.0)(move(inputs))
    quantized = assert_close(keras.Model(inputs, conv(padding="valid")(x)), PIXELS)
    graph = integer_graph(quantized)
    given = {graph.inputs[0]: PIXELS.astype(graph.tensors[graph.inputs[0]].dtype)}
    made = reference.run(graph, given)[graph.outputs[0]]
    step = graph.tensors[graph.ops[-1].inputs[0]].scale
    apart = np.abs(made - quantized.predict(PIXELS, verbose=0)) / step
    # Float32 sums fall on either side of a tie; the offset was a step in 12 to 32 of 100.
    assert apart.max() <= 1.01
    assert (apart > 0.5).mean() < 0.01
