"""Where a model and its file part: every layer is looked at, and a code that differs is counted."""

import keras
import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

from keras_lowbit import calibrate, quantize_model
from keras_lowbit.integer import reference
from tests.benchmarks import float_noise

pytestmark = [pytest.mark.once, pytest.mark.runtime]
K = keras.layers


def trained():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = K.Rescaling(1 / 255)(inputs)
    x = K.Conv2D(4, 3, padding="same", name="stem")(x)
    x = K.ReLU(name="stem_relu")(x)
    y = K.Conv2D(4, 1, name="point")(x)
    x = K.Add(name="sum")([x, y])
    model = keras.Model(inputs, K.Dense(3, name="logits")(K.GlobalAveragePooling2D(name="mean")(x)))
    images = float_noise.smooth_images(4, (8, 8, 3))
    return calibrate(quantize_model(model, "w4a8"), images), images


def test_codes_of_every_layer_are_compared():
    rows = float_noise.differences(*trained())
    sizes = {row["layer"]: row["compared"] for row in rows}
    assert sizes == {"stem_relu": 1024, "point": 1024, "sum": 1024, "mean": 16, "logits": 12}
    assert sum(row["wrong"] for row in rows) == 0


def test_a_code_that_differs_is_counted(monkeypatch):
    run = reference.run

    def flipped(graph, inputs):
        codes = run(graph, inputs)
        codes["point"].reshape(-1)[:3] ^= 1
        return codes

    monkeypatch.setattr(reference, "run", flipped)
    wrong = {row["layer"]: row["wrong"] for row in float_noise.differences(*trained())}
    assert {name: n for name, n in wrong.items() if n} == {"point": 3}


def test_smooth_images_are_pixels_that_a_seed_repeats():
    once, twice = (float_noise.smooth_images(2, (16, 16, 3), seed=1) for _ in range(2))
    np.testing.assert_array_equal(once, twice)
    assert once.min() >= 0
    assert 200 < once.max() <= 255
