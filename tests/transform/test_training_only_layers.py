"""Layers that do something while training only, and the maximum over a whole image."""

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.graph import dump
from keras_lowbit.kinds import kind_of
from keras_lowbit.kinds.calls import _AUGMENTATIONS
from keras_lowbit.transform import calibrate, fold_batchnorm, quantize_model, reestimate_batchnorm
from keras_lowbit.walk import flatten
from tests.transform.test_quantize_model import assert_close, assert_same_integers, images, numpy

K = keras.layers
SHAPE = (6, 5, 3)
PIXELS = np.random.default_rng(1).integers(0, 256, (16, *SHAPE)).astype("float32")


def net(augment=(), noise=(), rescale_first=False):
    """The same weights each time, whatever stands between."""
    x = inputs = keras.Input(SHAPE, name="image")
    rescale = K.Rescaling(1 / 127.5, -1.0, name="pixels")
    for layer in (rescale, *augment) if rescale_first else (*augment, rescale):
        x = layer(x)
    x = K.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(x)
    x = K.ReLU(name="relu")(K.BatchNormalization(name="bn")(x))
    for layer in noise:
        x = layer(x)
    x = K.Conv2D(4, 3, name="mid")(x)
    x = K.GlobalMaxPooling2D(name="most")(x)
    model = keras.Model(inputs, K.Dense(2, name="head")(x), name="net")
    random = np.random.default_rng(5)
    model.set_weights([np.abs(random.normal(size=w.shape)) + 0.1 for w in model.get_weights()])
    return model


def pictures():
    return [K.RandomFlip(seed=1, name="flip"), K.RandomRotation(0.2, seed=2, name="turn")]


def integers(model):
    """The dump of a model's integer graph without names, which lead back to other layers."""
    return [line.split("#")[0] for line in dump(integer_graph(model)).splitlines()]


def made(model):
    quantized = calibrate(quantize_model(model, "w4a4"), PIXELS)
    return reestimate_batchnorm(quantized, PIXELS)


@pytest.mark.parametrize("rescale_first", [False, True])
def test_random_augmentation_acts_in_training_and_nowhere_else(backend, rescale_first):
    plain = made(net())
    quantized = made(net(pictures(), [K.GaussianNoise(0.5, seed=3)], rescale_first))
    assert integers(quantized) == integers(plain)
    expected = plain.predict(PIXELS, verbose=0)
    np.testing.assert_array_equal(quantized.predict(PIXELS, verbose=0), expected)
    trained = numpy(quantized(PIXELS, training=True))
    again = numpy(quantized(PIXELS, training=True))
    assert np.abs(trained - again).max() > 1e-3


def test_a_model_with_augmentation_trains(backend):
    quantized = made(net(pictures(), [K.GaussianNoise(0.1), K.GaussianDropout(0.1)]))
    quantized.compile("sgd", "mse", jit_compile=False)
    history = quantized.fit(PIXELS, np.ones((16, 2)), epochs=2, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_a_folded_model_keeps_its_augmentation(backend):
    folded = fold_batchnorm(net(pictures()))
    assert {"flip", "turn"} < {layer.name for layer in folded.layers}
    first, second = (numpy(folded(PIXELS, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.once
def test_every_augmentation_of_this_keras_leaves_inference_alone():
    options = {"RandomTranslation": (0.2, 0.2), "RandomPosterization": (4,)}
    for name in _AUGMENTATIONS:
        layer_class = getattr(K, name, None)
        if layer_class is None:
            continue  # of a newer Keras
        try:
            layer = layer_class()
        except TypeError:
            layer = layer_class(*options.get(name, (0.2,)))
        np.testing.assert_array_equal(numpy(layer(PIXELS, training=False)), PIXELS, name)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("how", ["layer", "operation"])
def test_the_maximum_over_an_image_is_that_of_its_codes(backend, keepdims, how):
    x = inputs = keras.Input(SHAPE)
    x = K.ReLU()(K.Conv2D(4, 3, name="stem")(x))
    if how == "layer":
        x = K.GlobalMaxPooling2D(keepdims=keepdims)(x)
    else:
        x = ops.max(x, axis=(1, 2), keepdims=keepdims)
    x = K.Flatten()(x) if keepdims else x
    model = keras.Model(inputs, K.Dense(2, name="head")(x))
    assert "global_max_pool" in {kind_of(call) for call in flatten(model).calls}
    assert_same_integers(assert_close(model), images())


@pytest.mark.parametrize(("axis", "rank"), [(-1, 3), (1, 3), (None, 1), ((1, 2, 3), 1)])
def test_another_maximum_has_no_integer_form(axis, rank):
    x = inputs = keras.Input(SHAPE)
    x = ops.max(K.ReLU()(K.Conv2D(4, 3, name="stem")(x)), axis=axis)
    if rank == 3:
        x = K.Flatten()(x)
    elif axis is None:
        x = ops.reshape(x, (1, 1))
    else:
        x = K.Reshape((1,))(x)
    model = keras.Model(inputs, K.Dense(2, name="head")(x))
    quantized = calibrate(quantize_model(model, "w4a4"), images())
    with pytest.raises(tflite_export.NotExportable, match="only a maximum over height and width"):
        integer_graph(quantized)


@pytest.mark.runtime
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_file_computes_the_same_codes(weights):
    result = tflite_export.convert(made(net(pictures())), weights=weights, verify=PIXELS[:4])
    assert result.mismatches == 0
    assert result.verification.compared > 0
