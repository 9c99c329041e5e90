"""What follows the last epoch of a `fit` by recipe."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import data
from keras_lowbit.cli import fitting
from keras_lowbit.cli.recipe import Train
from keras_lowbit.transform import reestimate_batchnorm

TRAIN = Train(epochs=2, batch_size=64, reestimate_batches=3, shift=2, seed=5, xla="off")


def small():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(name="bn")(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def statistics(model):
    norm = model.get_layer("bn")
    return [np.array(ops.convert_to_numpy(v)) for v in (norm.moving_mean, norm.moving_variance)]


def test_batch_norms_take_their_statistics_from_augmented_batches(backend, tmp_path):
    digits = data.load("digits")
    model = small()
    fitting.fit(model, TRAIN, digits, history=tmp_path / "h.csv", backup=None, verbose=0)
    made = statistics(model)

    batches = data.AugmentedBatches(
        digits.x_train, digits.y_train, 64, seed=5, pad=2, drop_remainder=True
    )
    batches.epoch = 2
    expected = statistics(reestimate_batchnorm(model, batches, steps=3))
    plain = statistics(reestimate_batchnorm(model, np.asarray(digits.x_train[:192]), batch_size=64))
    for got, wanted, other in zip(made, expected, plain, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert np.abs(got - other).max() > 0.01 * np.abs(other).max()


@pytest.mark.parametrize(
    ("bias", "activation", "logits"),
    [
        ([3.0, -2.0], None, True),  # 1 as a sum, of which one is below 0
        ([3.0, 2.0], None, True),
        ([3.0, -2.0], "softmax", False),
    ],
)
def test_logits_whose_sum_is_one_are_no_probabilities(bias, activation, logits):
    """The probe is an image of zeros, so a dense layer gives its bias."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, activation=activation, name="head")(inputs))
    model.get_layer("head").bias.assign(bias)
    assert fitting.ends_in_logits(model) is logits
