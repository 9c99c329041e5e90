"""Bias correction takes the mean error of quantization off each channel."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb


def separable_net():
    inputs = keras.Input((9, 9, 3), name="image")
    x = keras.layers.SeparableConv2D(6, 3, activation="relu")(inputs)
    x = keras.layers.Conv2D(8, 1, use_bias=False, name="point")(x)
    x = keras.layers.BatchNormalization(name="point_bn")(x)
    x = keras.layers.ReLU(6.0)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(-1, 1, (24, 9, 9, 3)).astype("float32")


@pytest.fixture
def pair(images):
    model = separable_net()
    quantized = klb.quantize_model(model, "w2a4", input_range=(-1, 1))
    return model, klb.calibrate(quantized, images)


def channel_means(model, name, images):
    inner = keras.Model(model.inputs, model.get_layer(name).output)
    return inner.predict(images, verbose=0).mean(axis=(0, 1, 2))


def test_channel_means_become_those_of_the_float_model(pair, images):
    model, quantized = pair
    wanted = channel_means(model, "point_bn", images)
    before = np.abs(channel_means(quantized, "point_bn", images) - wanted).max()
    klb.correct_biases(quantized, model, images)
    after = np.abs(channel_means(quantized, "point_bn", images) - wanted).max()
    # What is left is half a unit of the bias, which is rounded to what a file can hold.
    assert after < before / 10


def test_the_outputs_of_a_two_bit_net_come_closer(pair, images):
    model, quantized = pair
    wanted = model.predict(images, verbose=0)
    before = np.abs(quantized.predict(images, verbose=0) - wanted).mean()
    klb.correct_biases(quantized, model, images)
    assert np.abs(quantized.predict(images, verbose=0) - wanted).mean() < before


def test_kernels_and_the_float_model_stay_as_they_are(pair, images):
    model, quantized = pair
    kernel = ops.convert_to_numpy(quantized.get_layer("point").kernel)
    weights = model.get_weights()
    klb.correct_biases(quantized, model, images)
    np.testing.assert_array_equal(ops.convert_to_numpy(quantized.get_layer("point").kernel), kernel)
    for before, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, before)


def test_an_uncalibrated_model_is_refused(images):
    model = separable_net()
    with pytest.raises(ValueError, match="Calibrate the model first"):
        klb.correct_biases(klb.quantize_model(model, "w4a4"), model, images)


def test_another_float_model_is_refused(pair, images):
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, name="elsewhere")(inputs)
    other = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    with pytest.raises(ValueError, match="shares no layer names"):
        klb.correct_biases(pair[1], other, images)


def test_a_shared_layer_keeps_its_bias_and_others_are_corrected(images):
    """Corrected at the call that sees the larger inputs, it would be off at the other."""
    shared = keras.layers.Conv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.ReLU()(shared(keras.layers.ReLU()(shared(inputs))))
    x = keras.layers.Conv2D(4, 1, name="own")(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    quantized = klb.calibrate(klb.quantize_model(model, "w2a4"), images)
    before = {n: ops.convert_to_numpy(quantized.get_layer(n).bias) for n in ("shared", "own")}
    klb.correct_biases(quantized, model, images)
    after = {n: ops.convert_to_numpy(quantized.get_layer(n).bias) for n in before}
    # What a file can hold is all that the one moved to, and it was there already.
    np.testing.assert_allclose(after["shared"], before["shared"], atol=1e-6)
    assert np.abs(after["own"] - before["own"]).max() > 1e-3


def test_an_activation_may_be_a_layer(images):
    inputs = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, activation=keras.layers.ReLU(6.0), name="a")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    quantized = klb.calibrate(klb.quantize_model(model, "w4a4"), images)
    wanted = model.predict(images, verbose=0).mean(axis=0)
    klb.correct_biases(quantized, model, images)
    apart = np.abs(quantized.predict(images, verbose=0).mean(axis=0) - wanted)
    assert apart.max() < 0.02


def test_several_batches_are_refused_and_arrays_by_name_are_taken(pair, images):
    model, quantized = pair
    with pytest.raises(ValueError, match=r"over one batch\. Got 2: pass one array"):
        klb.correct_biases(quantized, model, [(images[:8],), (images[8:],)])
    klb.correct_biases(quantized, model, {"image": images})
