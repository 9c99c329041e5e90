"""What a recipe makes of a model before it is trained."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.cli.making import folded, quantized
from keras_lowbit.cli.recipe import read_recipe
from keras_lowbit.data import Dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3)).astype("uint8")
DATASET = Dataset(IMAGES, np.arange(64) % 4, IMAGES[:4], np.arange(4), name="made")
K = keras.layers


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[quantize]\nscheme = 'w4a4'\n[train]\nepochs = 1\n")
    return read_recipe(path)


def model(normalized=False):
    inputs = keras.Input((6, 6, 3))
    pixels = K.Normalization(name="pixels") if normalized else K.Rescaling(1 / 255)
    if normalized:
        pixels.adapt(IMAGES.astype("float32"))
    x = K.Conv2D(4, 3, use_bias=False, name="c0")(pixels(inputs))
    x = K.ReLU()(K.BatchNormalization(name="norm0")(x))
    x = K.Conv2D(4, 3, use_bias=False, name="c1")(x)
    x = K.ReLU()(K.BatchNormalization(name="norm1")(x))
    return keras.Model(inputs, K.Dense(4)(K.GlobalAveragePooling2D()(x)))


def variance(made, name):
    return ops.convert_to_numpy(made.get_layer(name).moving_variance)


@pytest.mark.parametrize("normalized", [False, True])
def test_untrained_batch_norms_see_the_images_first(recipe, normalized):
    given = model(normalized)
    made = quantized(given, recipe, DATASET)
    assert (variance(given, "norm0") == 1).all(), "the float model stays"
    front = keras.Model(given.inputs, given.get_layer("c0").output)
    features = front.predict(IMAGES.astype("float32"), verbose=0)
    # Means over batches of 32 of their variances, in float32.
    np.testing.assert_allclose(variance(made, "norm0"), features.var((0, 1, 2)), rtol=0.05)


def test_trained_statistics_beside_new_ones_stay(recipe):
    given = model()
    given.get_layer("norm0").moving_variance.assign(np.full(4, 7.0))
    with pytest.warns(UserWarning, match="norm1"):
        made = quantized(given, recipe, DATASET)
    np.testing.assert_array_equal(variance(made, "norm0"), 7.0)
    np.testing.assert_array_equal(variance(made, "norm1"), 1.0)


def test_a_fold_takes_statistics_of_the_images_in(recipe):
    given = model()
    kernel = ops.convert_to_numpy(folded(given, recipe, DATASET).get_layer("c0").kernel)
    before = ops.convert_to_numpy(given.get_layer("c0").kernel)
    assert np.abs(kernel / before).min() > 1.5  # divided by deviations well below 1
