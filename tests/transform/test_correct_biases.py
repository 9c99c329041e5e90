"""Bias correction takes the mean error of quantization off each channel."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb

K = keras.layers


def separable_net(head=None):
    inputs = keras.Input((9, 9, 3), name="image")
    x = keras.layers.SeparableConv2D(6, 3, activation="relu")(inputs)
    x = keras.layers.Conv2D(8, 1, use_bias=False, name="point")(x)
    x = keras.layers.BatchNormalization(name="point_bn")(x)
    x = keras.layers.ReLU(6.0)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4, activation=head, name="logits")(x))


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


@pytest.mark.parametrize("head", [None, "softmax", "sigmoid"])
def test_the_outputs_of_a_two_bit_net_come_closer(head, images):
    keras.utils.set_random_seed(3)
    model = separable_net(head)
    quantized = klb.calibrate(klb.quantize_model(model, "w2a4", input_range=(-1, 1)), images)
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
    with pytest.raises(ValueError, match=r"calibrate .* first"):
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


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **more: K.Dense(4, activation="softmax", **more), (6,)),
        (lambda **more: K.Dense(4, activation="sigmoid", **more), (6,)),
        (lambda **more: K.Dense(4, activation=K.Softmax(), **more), (6,)),
        (lambda **more: K.Conv2D(4, 3, activation="silu", **more), (7, 5, 3)),
    ],
)
def test_a_bias_moves_by_the_means_in_front_of_its_own_activation(make, shape):
    """Quantized, the activation is a layer behind the product: means of its outputs say nothing."""
    random = np.random.default_rng(4)
    x = random.uniform(-1, 1, (32, *shape)).astype("float32") + np.float32(0.5)
    inputs = keras.Input(shape)
    layer = make(name="product")
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(random.normal(size=layer.kernel.shape))
    layer.bias.assign(random.normal(size=4))
    written = layer.activation
    scheme = klb.Scheme(2, 8, ends_bits=None)
    quantized = klb.calibrate(klb.quantize_model(model, scheme), x)
    product = quantized.get_layer("product")
    plain = type(layer).from_config({**layer.get_config(), "activation": None})
    plain.build((None, *shape))
    plain.set_weights(layer.get_weights())
    sums = ops.convert_to_numpy(plain(x)).reshape(-1, 4)
    got = keras.Model(quantized.input, product.output).predict(x, verbose=0).reshape(-1, 4)
    before = np.array(ops.convert_to_numpy(product.bias))
    klb.correct_biases(quantized, model, x)
    moved = ops.convert_to_numpy(product.bias) - before
    read = next(one for one in quantized.layers if isinstance(one, klb.layers.Quantize))
    unit = ops.convert_to_numpy(read.quantizer.scale) * ops.convert_to_numpy(
        product.kernel_quantizer.scale
    )
    # Half a unit of the bias, which is rounded to what a file can hold, and float32 of the sums.
    assert np.all(np.abs(moved - (sums - got).mean(axis=0)) <= 0.501 * unit.reshape(-1) + 1e-5)
    assert np.abs(moved).max() > 4 * unit.max()
    assert layer.activation is written


@pytest.mark.parametrize(
    ("name", "argument"), [("point", "kernel_quantizer"), ("logits_quantize", "quantizer")]
)
def test_a_model_with_a_quantizer_off_is_refused_by_name(name, argument, pair, images):
    model, quantized = pair
    quantizer = getattr(quantized.get_layer(name), argument)
    quantizer.add_switch()
    quantizer.set_enabled(False)
    before = quantized.get_weights()
    with pytest.raises(ValueError, match=rf"{name}.*switched off.*set_enabled\(True\)"):
        klb.correct_biases(quantized, model, images)
    for old, new in zip(before, quantized.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    quantizer.set_enabled(True)
    klb.correct_biases(quantized, model, images)
