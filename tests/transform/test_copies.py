"""What copies of a layer keep: everything that the original computes with."""

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import fold_batchnorm, zoo
from keras_lowbit.transform import calibrate, copies, quantize_model, rescale_pairs
from tests.transform.nearness import rounding_noise

K = keras.layers
SHAPE = (8, 8, 3)
MEAN, DEVIATION = (5.0, -3.0, 120.0), (2.0, 0.5, 40.0)


def images(n=8):
    reals = np.random.default_rng(0).normal(MEAN, DEVIATION, (n, *SHAPE))
    return reals.astype("float32")


def adapted_model():
    norm = K.Normalization(name="norm")
    norm.adapt(images(64))
    inputs = keras.Input(SHAPE)
    x = K.DepthwiseConv2D(3, name="dw")(norm(inputs))
    return keras.Model(inputs, K.Conv2D(2, 1, name="pw")(K.ReLU()(x)))


COPIES = {
    "quantized": lambda model: quantize_model(model, "w8a8"),
    "folded": fold_batchnorm,
    "rescaled": lambda model: rescale_pairs(model, images()),
}


@pytest.mark.parametrize("copy", COPIES)
def test_an_adapted_normalization_has_its_mean_and_variance_in_copies(copy):
    model = adapted_model()
    norm = COPIES[copy](model).get_layer("norm")
    for name in ("mean", "variance"):
        wanted = ops.convert_to_numpy(getattr(model.get_layer("norm"), name))
        made = ops.convert_to_numpy(getattr(norm, name))
        np.testing.assert_array_equal(made, wanted)
    # (mean + deviation - mean) / deviation, but for the 64 images' own moments: of 4,096 pixels a
    # mean is 0.016 deviations off and a deviation 0.011, and 0.1 is five times both
    ends = np.broadcast_to(np.add(MEAN, DEVIATION).astype("float32"), (1, *SHAPE))
    np.testing.assert_allclose(ops.convert_to_numpy(norm(ends)), 1.0, atol=0.1)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_copied_normalization_computes_in_float32(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        quantized = quantize_model(adapted_model(), "w8a8")
    finally:
        keras.mixed_precision.set_global_policy("float32")
    norm = quantized.get_layer("norm")
    mean, variance = (ops.convert_to_numpy(v) for v in (norm.adapt_mean, norm.adapt_variance))
    expected = (images() - mean) / np.sqrt(variance)
    made = ops.convert_to_numpy(norm(images()))
    np.testing.assert_allclose(made, expected, atol=1e-5)  # float32: 1e-7 of 120 / 2


def test_a_resized_model_has_its_mean_and_variance():
    quantized = calibrate(quantize_model(adapted_model(), "w8a8"), images())
    resized = zoo.adapt.with_input_shape(quantized, (12, 12, 3))
    made, wanted = (m.get_layer("norm").mean for m in (resized, quantized))
    np.testing.assert_array_equal(ops.convert_to_numpy(made), ops.convert_to_numpy(wanted))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_all_256_pixel_codes_survive_a_rescaling_under_mixed_precision(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        inputs = keras.Input((16, 16, 1))
        x = K.Conv2D(2, 3, name="conv")(K.Rescaling(1 / 127.5, -1.0, name="rescale")(inputs))
        quantized = quantize_model(keras.Model(inputs, x), "w8a8")
    finally:
        keras.mixed_precision.set_global_policy("float32")
    pixels = np.arange(256, dtype="float32").reshape(1, 16, 16, 1)
    reals = quantized.get_layer("rescale")(pixels)
    codes, _ = quantized.get_layer("rescale_quantize")(reals)
    codes = ops.convert_to_numpy(codes).reshape(-1)
    # 0.0 lies between pixels 127 and 128; codes start at round(-127.5) = -128.
    np.testing.assert_array_equal(codes, np.arange(256) - 128)


def test_whatever_stands_between_grids_is_float32_under_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        inputs = keras.Input(SHAPE)
        x = K.ReLU(name="relu")(K.BatchNormalization(name="bn")(K.Conv2D(4, 1, name="a")(inputs)))
        x = K.Concatenate(name="cat")([x, K.AveragePooling2D(3, 1, "same", name="pool")(x)])
        x = K.Conv2D(4, 1, name="float")(x)
        x = K.Dense(2, name="head")(K.GlobalAveragePooling2D(name="gap")(x))
        model = quantize_model(keras.Model(inputs, x), {"*": "w8a8", "float": None})
    finally:
        keras.mixed_precision.set_global_policy("float32")
    found = {layer.name: layer.compute_dtype for layer in model.layers[1:]}
    assert {name for name, dtype in found.items() if dtype != "float32"} == {"float"}


def halved(x):
    return 0.5 * x


class Odd(keras.regularizers.Regularizer):
    """Of a class that Keras has no record of."""

    def __call__(self, x):
        return 0.01 * ops.sum(ops.square(x))

    def get_config(self):
        return {}


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_functions_that_keras_cannot_write_down_are_shared_with_the_copy():
    scale = 3.0
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, name="a", kernel_regularizer=Odd())(inputs)
    x = K.Activation(halved, name="half")(x)
    x = K.Lambda(lambda t: t * scale, name="triple")(x)
    x = K.Activation(lambda t: ops.minimum(t, 2.0), name="cap")(x)
    x = K.Conv2D(4, 1, activation=halved, name="b")(x)
    model = keras.Model(inputs, K.Dense(2, name="c")(K.Flatten()(x)))
    data = images() / 40
    wanted = model.predict(data, verbose=0)
    # Without batch norms the folded model is the same one.
    np.testing.assert_array_equal(fold_batchnorm(model).predict(data, verbose=0), wanted)
    quantized = calibrate(quantize_model(model, "w8a8"), data)
    made = quantized.predict(data, verbose=0)
    np.testing.assert_allclose(made, wanted, atol=rounding_noise(quantized, wanted))
    assert any("triple (Lambda) has no integer form" in line for line in tflite_export.check(model))


class Bare(keras.regularizers.Regularizer):
    """Without a config, as is enough to train with."""

    def __call__(self, x):
        return 0.01 * ops.sum(ops.square(x))


def test_a_regularizer_without_a_config_is_shared_with_the_copy():
    inputs, bare = keras.Input(SHAPE), Bare()
    layer = K.Conv2D(4, 3, name="a", kernel_regularizer=bare)
    model = keras.Model(inputs, layer(inputs))
    for copy in (fold_batchnorm(model), quantize_model(model, "w8a8")):
        assert copy.get_layer("a").kernel_regularizer is bare
    assert layer.kernel_regularizer is bare


class Needy(K.Layer):
    """Cannot be made again: its config lacks what it needs."""

    def __init__(self, gain, name=None):
        super().__init__(name=name)
        self.gain = gain

    def get_config(self):
        return {"name": self.name}

    def call(self, inputs):
        return inputs * self.gain


def test_a_layer_that_cannot_be_made_again_is_named_in_one_line():
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, Needy(2.0, name="needy")(K.Conv2D(2, 1)(inputs)))
    with pytest.raises(ValueError, match=r"^needy \(Needy\) cannot be copied: .*'gain'") as caught:
        quantize_model(model, "w8a8")
    assert len(str(caught.value).splitlines()) == 1


class Picky(Needy):
    """Of a config that neither way takes, each for its own reason."""

    @classmethod
    def from_config(cls, config):
        raise ValueError("gains are kept in a file\nthat is not there")


class Silent(K.Layer):
    """Refuses its own config without a word."""

    def __init__(self, name=None, made=False):
        super().__init__(name=name)
        if made:
            raise ValueError

    def get_config(self):
        return {"name": self.name, "made": True}

    def call(self, inputs):
        return inputs


def test_both_reasons_why_a_layer_cannot_be_made_again_are_told():
    layer = Picky(2.0, name="picky")
    with pytest.raises(ValueError, match=r"^picky \(Picky\) cannot be copied: ") as caught:
        copies.rebuilt(layer, copies.config_of(layer))
    text = str(caught.value)
    assert "its from_config: gains are kept in a file; its constructor: " in text
    assert "missing 1 required positional argument: 'gain'" in text
    assert "Give its class a get_config and a from_config that fit" in text
    assert len(text.splitlines()) == 1
    second = caught.value.__cause__
    assert isinstance(second, TypeError)
    assert "gains are kept in a file\nthat is not there" in str(second.__context__)


def test_one_reason_of_both_ways_is_told_once():
    layer = Needy(2.0, name="needy")
    with pytest.raises(ValueError, match="needy") as caught:
        copies.rebuilt(layer, copies.config_of(layer))
    assert str(caught.value).count("'gain'") == 1


def test_an_error_without_words_is_told_by_its_class():
    layer = Silent(name="silent")
    with pytest.raises(ValueError, match=r"^silent \(Silent\) cannot be copied: ValueError\. Give"):
        copies.rebuilt(layer, copies.config_of(layer))
