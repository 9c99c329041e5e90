"""Inputs that are no images, several inputs, and ranges of each."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import fold_batchnorm, layers
from keras_lowbit.transform import calibrate, quantize_model
from tests.transform.nearness import rounding_noise

K = keras.layers
SHAPE = (6, 5, 3)
RANDOM = np.random.default_rng(0)


def numpy(x):
    return ops.convert_to_numpy(x)


def grids(model):
    return [x.name for x in model.layers if isinstance(x, layers.Quantize)]


def pair_model():
    """An image in -1..1 and a row of numbers in 0..50."""
    image, row = keras.Input(SHAPE, name="image"), keras.Input((4,), name="row")
    x = K.Flatten()(K.Conv2D(4, 3, name="conv")(image))
    x = K.Concatenate()([x, K.Dense(6, name="wide")(row)])
    return keras.Model([image, row], K.Dense(2, name="head")(x))


def pair_data(n=16):
    image = RANDOM.uniform(-1, 1, (n, *SHAPE)).astype("float32")
    return [image, RANDOM.uniform(0, 50, (n, 4)).astype("float32")]


@pytest.mark.parametrize("moved", [False, True])
def test_indices_of_an_embedding_are_no_pixels(moved):
    """On an 8-bit grid 0..999 would have a step of nearly 4 rows."""
    ids, row = keras.Input((2,), name="ids"), keras.Input((4,), name="row")
    rows = K.Embedding(1000, 3, name="table")(K.Reshape((1, 2))(ids) if moved else ids)
    x = K.Concatenate()([K.Flatten()(rows), row])
    model = keras.Model([ids, row], K.Dense(2, name="head")(x))
    wide = np.float32(RANDOM.normal(size=(1000, 3)))
    model.get_layer("table").set_weights([wide])
    data = [np.arange(32).reshape(16, 2) * 31.0, RANDOM.normal(size=(16, 4))]
    data = [x.astype("float32") for x in data]
    quantized = calibrate(quantize_model(model, "w8a8"), data)
    assert "ids_quantize" not in grids(quantized)
    wanted = model.predict(data, verbose=0)
    made = quantized.predict(data, verbose=0)
    np.testing.assert_allclose(made, wanted, atol=rounding_noise(quantized, wanted))


def test_a_pair_is_the_range_of_images_and_not_of_other_inputs():
    model, data = pair_model(), pair_data()
    quantized = calibrate(quantize_model(model, "w8a8", input_range=(-1, 1)), data)
    image, row = (quantized.get_layer(f"{n}_quantize").quantizer for n in ("image", "row"))
    assert image.is_calibrated
    np.testing.assert_allclose(numpy(image.scale), 2 / 255, rtol=1e-6)  # float32
    np.testing.assert_allclose(numpy(row.scale) * 255, data[1].max(), rtol=1e-6)  # float32
    wanted = model.predict(data, verbose=0)
    made = quantized.predict(data, verbose=0)
    # Twice: 72 small values share the grid of 6 large ones, and the head sums all their roundings.
    np.testing.assert_allclose(made, wanted, atol=2 * rounding_noise(quantized, wanted))


def test_ranges_are_given_by_input_name():
    ranges = {"row": (0, 51), "image": None}
    quantized = quantize_model(pair_model(), "w8a8", input_range=ranges)
    row = quantized.get_layer("row_quantize").quantizer
    np.testing.assert_allclose(numpy(row.scale), 0.2, rtol=1e-6)  # float32
    assert not quantized.get_layer("image_quantize").quantizer.is_calibrated


def test_the_only_input_takes_a_pair_whatever_its_shape():
    inputs = keras.Input((4,), name="row")
    model = keras.Model(inputs, K.Dense(2)(inputs))
    quantizer = quantize_model(model, "w8a8", input_range=(0, 51)).get_layer("row_quantize")
    np.testing.assert_allclose(numpy(quantizer.quantizer.scale), 0.2, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"rows": (0, 1)},
            r"input_range names \['rows'\]\. The model's inputs: \['image', 'row'\]",
        ),
        (([0, 0, 0], [1, 1, 1]), r"pair of numbers.*range by channel put a Normalization"),
        ((np.zeros(3), np.ones(3)), r"pair of numbers.*range by channel put a Normalization"),
        (3, r"pair of numbers.*Got 3"),
        ({"row": (1, 0)}, r"input_range must rise\. Got \(1, 0\)"),
    ],
)
def test_what_is_no_range_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_model(pair_model(), "w8a8", input_range=given)


@pytest.mark.parametrize("copy", [lambda m: m, fold_batchnorm])
def test_a_fixed_batch_size_stays_and_is_what_calibrate_takes(copy):
    inputs = keras.Input(batch_shape=(4, *SHAPE), name="image")
    x = ops.reshape(K.Conv2D(4, 3, name="conv")(inputs), (4, -1))
    model = keras.Model(inputs, K.Dense(2, name="head")(x))
    made = quantize_model(copy(model), "w8a8")
    assert made.inputs[0].shape == (4, *SHAPE)
    data = RANDOM.uniform(-1, 1, (8, *SHAPE)).astype("float32")
    calibrate(made, data)
    wanted = model.predict(data, batch_size=4, verbose=0)
    found = made.predict(data, batch_size=4, verbose=0)
    np.testing.assert_allclose(found, wanted, atol=rounding_noise(made, wanted))
    with pytest.raises(ValueError, match=r"must have shape \(4, 6, 5, 3\).* Got \(2, 6, 5, 3\)"):
        calibrate(made, data[:6])
