"""Sums on grids in a simple ratio: no tie is left for Keras and files to round differently."""

import importlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb
from keras_lowbit.transform.leave_ties import leave_ties, ties

K = keras.layers
IMAGES = np.random.default_rng(0).random((8, 8, 8, 3)).astype("float32")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.0], False),
        ([0.5], True),  # 1/2, 3/2, ...
        ([0.3], True),  # 5 * 0.3 = 1.5
        ([0.2], False),  # n / 5 is no half
        ([1.0, 2.0], False),
        ([0.5, 1.0], True),
        ([0.25, 0.25], True),
        ([np.sqrt(0.5), np.pi / 3], False),
    ],
)
def test_ties_by_hand(ratios, expected):
    assert ties(np.array(ratios)) == expected


def pooled(x):
    return K.Add(name="sum")([x, K.MaxPool2D(3, 1, padding="same")(x)])


def thrice(x):
    return K.Add(name="sum")([x, K.ReLU(6.0)(x), x])


BLOCKS = {
    "x and its max pool": (pooled, "relu"),
    "three": (thrice, None),
    "leaky relu, 0.3": (K.LeakyReLU(0.3), None),
    "leaky relu, 0.5": (K.LeakyReLU(0.5), None),
}


def calibrated(block, activation, method):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((8, 8, 3))
    x = K.Conv2D(8, 3, activation=activation, name="conv")(inputs)
    model = klb.quantize_model(keras.Model(inputs, block(x)), "w8a8")
    return klb.calibrate(model, IMAGES, method=method)


@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_calibrated_model_is_its_file(name, method):
    model = calibrated(*BLOCKS[name], method)
    trained = model.predict(IMAGES, verbose=0)
    np.testing.assert_array_equal(trained, klb.freeze(model).predict(IMAGES, verbose=0))


def test_a_scale_moves_by_very_little_and_old_ones_stay(monkeypatch):
    module = importlib.import_module("keras_lowbit.transform.calibrate")
    with monkeypatch.context() as patch:
        patch.setattr(module, "leave_ties", lambda *_: None)
        before = calibrated(pooled, "relu", "minmax")
    after = calibrated(pooled, "relu", "minmax")

    def scale(model):
        return float(ops.convert_to_numpy(model.get_layer("sum_quantize").quantizer.scale))

    assert 0.998 < scale(after) / scale(before) < 1.0
    kept = scale(before)
    klb.calibrate(before, IMAGES, only_new=True)
    assert scale(before) == kept


def test_a_scale_that_moves_onto_a_tie_behind_it_moves_that_too():
    """With s = 4095 / 4096: a and b in steps 1/2 and 1 tie on 1, so that grid becomes s.

    Behind it 1 / (2 s) was no tie and s / (2 s) = 1/2 is one: the second grid becomes 2 s^2.
    """
    share = 4095 / 4096
    inputs = keras.Input((2, 2, 3))
    first = K.Add(name="first")([K.Conv2D(2, 1, name=name)(inputs) for name in ("a", "b")])
    second = K.Add(name="second")([first, K.Conv2D(2, 1, name="c")(inputs)])
    model = klb.calibrate(
        klb.quantize_model(keras.Model(inputs, second), "w8a8"), IMAGES[:, :2, :2]
    )
    scales = {"a": 0.5, "b": 1.0, "first": 1.0, "c": 2 * share, "second": 2 * share}
    quantizers = {name: model.get_layer(f"{name}_quantize").quantizer for name in scales}
    for name, scale in scales.items():
        quantizers[name].take_scale(np.float32(scale))
    leave_ties(model, [quantizers["first"], quantizers["second"]])
    found = {name: float(ops.convert_to_numpy(q.scale)) for name, q in quantizers.items()}
    assert found == {**scales, "first": share, "second": 2 * share**2}
