"""What a refusal says to write instead: that it says so, and that this exports exactly."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import calibrate, quantize_model
from keras_lowbit.kinds import CALL_REWRITES, REWRITES, known_layers
from tflite_export import check, convert

pytestmark = pytest.mark.runtime

K = keras.layers
STEPS, IMAGE = (8, 3), (8, 6, 3)


def both(layer):
    """A layer of two tensors, as one of a single tensor."""
    return lambda x: layer([x, K.ReLU()(x)])


def image_of_steps(x):
    return K.Reshape((STEPS[0], 1, STEPS[1]))(x)


def subtracted(tensors):
    first, second = tensors
    return K.Add()([first, K.Rescaling(-1.0)(second)])


# Name: shape of images, the layer, what to write for it; layers of one function share weights.
SAME = {
    "Conv1D": (STEPS, K.Conv1D(4, 3), lambda x: K.Conv2D(4, (3, 1))(image_of_steps(x))),
    "DepthwiseConv1D": (
        STEPS,
        K.DepthwiseConv1D(3, padding="same"),
        lambda x: K.DepthwiseConv2D((3, 1), padding="same")(image_of_steps(x)),
    ),
    "SeparableConv1D": (
        STEPS,
        K.SeparableConv1D(4, 3),
        lambda x: K.SeparableConv2D(4, (3, 1))(image_of_steps(x)),
    ),
    "MaxPooling1D": (STEPS, K.MaxPool1D(2), lambda x: K.MaxPool2D((2, 1))(image_of_steps(x))),
    "AveragePooling1D": (
        STEPS,
        K.AveragePooling1D(2),
        lambda x: K.AveragePooling2D((2, 1))(image_of_steps(x)),
    ),
    "GlobalMaxPooling1D": (
        STEPS,
        K.GlobalMaxPooling1D(),
        lambda x: K.GlobalMaxPooling2D()(image_of_steps(x)),
    ),
    "GlobalAveragePooling1D": (
        STEPS,
        K.GlobalAveragePooling1D(),
        lambda x: K.GlobalAveragePooling2D()(image_of_steps(x)),
    ),
    "UpSampling1D": (STEPS, K.UpSampling1D(3), lambda x: K.UpSampling2D((3, 1))(image_of_steps(x))),
    "ZeroPadding1D": (
        STEPS,
        K.ZeroPadding1D((1, 2)),
        lambda x: K.ZeroPadding2D(((1, 2), (0, 0)))(image_of_steps(x)),
    ),
    "SpatialDropout1D": (STEPS, K.SpatialDropout1D(0.5), K.Dropout(0.5)),
    "Average": (IMAGE, both(K.Average()), lambda x: K.Rescaling(1 / 2)(both(K.Add())(x))),
    "Subtract": (IMAGE, both(K.Subtract()), both(subtracted)),
}
# Others are of another function, to be trained anew.
NEAR = {
    "Conv2DTranspose": (
        IMAGE,
        K.Conv2DTranspose(4, 3, 2),
        lambda x: K.Conv2D(4, 3)(K.UpSampling2D(2)(x)),
    ),
    "LayerNormalization": (IMAGE, K.LayerNormalization(), K.BatchNormalization()),
    "GroupNormalization": (IMAGE, K.GroupNormalization(1), K.BatchNormalization()),
    "RMSNormalization": (IMAGE, K.RMSNormalization(), K.BatchNormalization()),
    "ELU": (IMAGE, K.ELU(), K.LeakyReLU(0.1)),
    "PReLU": (IMAGE, K.PReLU(), K.LeakyReLU(0.1)),
}
CASES = {**SAME, **NEAR}


def model_of(shape, layer):
    """Calls of a layer may stand for it; a new one of the same kind goes into each model."""
    if isinstance(layer, K.Layer):
        layer = type(layer).from_config(layer.get_config())
    inputs = keras.Input(shape)
    x = K.Dense(3)(inputs) if shape is STEPS else K.Conv2D(3, 3)(inputs)
    return keras.Model(inputs, K.Dense(2)(K.Flatten()(layer(x))))


def data(shape):
    return np.random.default_rng(0).normal(size=(6, *shape)).astype("float32")


def test_every_rewrite_has_its_proof():
    assert {*CASES} == {*REWRITES}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_without_an_integer_form_says_what_to_write(name):
    shape, layer, _ = CASES[name]
    (sentence,) = check(model_of(shape, layer))
    assert f"({name}) has no integer form. Write {REWRITES[name]} instead" in sentence


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", CASES)
def test_what_to_write_exports_exactly(name, scheme):
    shape, _, rewrite = CASES[name]
    model = calibrate(quantize_model(model_of(shape, rewrite), scheme), data(shape))
    assert convert(model, verify=2 * data(shape)).mismatches == 0


@pytest.mark.parametrize("name", SAME)
def test_what_to_write_computes_the_same(name):
    shape, layer, rewrite = SAME[name]
    old, new = model_of(shape, layer), model_of(shape, rewrite)
    new.set_weights(
        [w.reshape(v.shape) for w, v in zip(old.get_weights(), new.weights, strict=True)]
    )
    # Float32 noise of sums in another order.
    np.testing.assert_allclose(
        new.predict(data(shape), verbose=0),
        old.predict(data(shape), verbose=0),
        rtol=1e-4,
        atol=1e-5,
    )


def split(x):
    first, second, third = ops.split(x, 3, axis=-1)
    return K.Concatenate()([third, first, second])


def sliced(x):
    return K.Concatenate()([x[..., 2:], x[..., :1], x[..., 1:2]])


@pytest.mark.parametrize(
    ("name", "call", "rewrite"),
    [("Clip", lambda x: ops.clip(x, 0.0, 2.0), K.ReLU(2.0)), ("Split", split, sliced)],
)
def test_calls_say_what_to_write_too(name, call, rewrite):
    old, new = model_of(IMAGE, call), model_of(IMAGE, rewrite)
    new.set_weights(old.get_weights())
    (sentence,) = check(old)
    assert f"({name}) has no integer form. Write {CALL_REWRITES[name]} instead" in sentence
    np.testing.assert_array_equal(
        new.predict(data(IMAGE), verbose=0), old.predict(data(IMAGE), verbose=0)
    )
    model = calibrate(quantize_model(new, "w4a4"), data(IMAGE))
    assert convert(model, verify=data(IMAGE)).mismatches == 0


def test_a_layer_without_a_rewrite_says_which_layers_export():
    inputs = keras.Input(IMAGE)
    x = K.Lambda(keras.ops.sin, name="wave")(K.Conv2D(4, 3)(inputs))
    (sentence,) = check(keras.Model(inputs, K.Dense(2)(K.Flatten()(x))))
    assert "wave (Lambda) has no integer form. Leave it out, or end the exported model" in sentence
    assert "AveragePooling2D" in sentence
    assert "GlobalAveragePooling2D" in sentence
    assert "dequantize" not in sentence.lower()
    assert all(hasattr(K, name) for name in known_layers())


def test_a_layer_of_the_users_own_is_to_be_written_into_the_model():
    class Gate(K.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.product = K.Conv2D(4, 1, activation="hard_sigmoid")

        def call(self, x):
            return x * self.product(keras.ops.mean(x, (1, 2), keepdims=True))

    inputs = keras.Input(IMAGE)
    x = Gate(name="gate")(K.Conv2D(4, 3)(inputs))
    (sentence,) = check(keras.Model(inputs, K.Dense(2)(K.Flatten()(x))))
    assert "gate (Gate) has no integer form. Write what its call computes into the mod" in sentence


@pytest.mark.parametrize("activation", [keras.ops.gelu, keras.activations.elu])
def test_a_call_of_an_activation_without_a_form_says_which_have_one(activation):
    inputs = keras.Input(IMAGE)
    x = activation(K.Conv2D(4, 3)(inputs))
    (sentence,) = check(keras.Model(inputs, K.Dense(2)(K.Flatten()(x))))
    assert "has no integer form. Write relu (with a max_value or none)" in sentence


def test_a_difference_of_two_tensors_is_one_however_it_is_written():
    inputs = keras.Input(IMAGE)
    x = K.Conv2D(4, 3)(inputs)
    (sentence,) = check(keras.Model(inputs, K.Dense(2)(K.Flatten()(x - K.ReLU()(x)))))
    assert "Write Rescaling(-1.0) of the second tensor and Add instead" in sentence


def test_a_smaller_tensor_that_is_repeated_can_be_added():
    """As the refusal says."""
    inputs = keras.Input(IMAGE)
    x = K.Conv2D(4, 3, padding="same")(inputs)
    mean = K.GlobalAveragePooling2D(keepdims=True)(x)
    (sentence,) = check(keras.Model(inputs, K.Dense(2)(K.Flatten()(K.Add()([x, mean])))))
    assert "repeat the smaller one, such as (1, 1, channels) with UpSampling2D" in sentence
    assert "or (height, width, 1) with Concatenate()([x] * channels)" in sentence
    x = K.Add()([x, K.UpSampling2D(IMAGE[:2])(mean)])
    model = quantize_model(keras.Model(inputs, K.Dense(2)(K.Flatten()(x))), "w8a8")
    assert convert(calibrate(model, data(IMAGE)), verify=data(IMAGE)).mismatches == 0


def between(middle):
    """`middle` of a convolution's 5 channels."""
    inputs = keras.Input(IMAGE)
    return keras.Model(inputs, middle(K.Conv2D(5, 3, padding="same")(inputs)))


def tent(size, interpolated, window, *rows):
    def smooth(x):
        kernel = np.outer(*rows)[..., None, None] * np.ones((1, 1, 5, 1))
        weigh = K.DepthwiseConv2D(window, padding="same", use_bias=False)
        x = weigh(K.UpSampling2D(size)(x))
        weigh.set_weights([kernel])
        return K.Cropping2D(size)(x)

    def bilinear(x):
        return K.Cropping2D(size)(K.UpSampling2D(size, interpolation="bilinear")(x))

    return bilinear, interpolated, smooth


def by_channels(pool, back):
    return lambda x: K.Reshape(back)(pool((1, 5))(K.Reshape((48, 5, 1))(x)))


def scaled_sum(x):
    layer = sys.modules[keras.applications.InceptionResNetV2.__module__].CustomScaleLayer
    return layer(0.17, name="sum")([x, K.ReLU()(x)])


# What is refused, words of the refusal, and what they say to write.
SAID = {
    "bilinear": tent(
        (2, 2),
        "Got 'bilinear'; the same but at the border is nearest, then DepthwiseConv2D((3, 3), "
        "padding='same', use_bias=False) with np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]) as "
        "its kernel of each channel",
        (3, 3),
        [0.25, 0.5, 0.25],
        [0.25, 0.5, 0.25],
    ),
    "bilinear, other sizes": tent(
        (3, 4),
        "DepthwiseConv2D((3, 5), padding='same', use_bias=False) with "
        "np.outer([0.333333, 0.333333, 0.333333], [0.125, 0.25, 0.25, 0.25, 0.125]) as its",
        (3, 5),
        [1 / 3] * 3,
        [0.125, 0.25, 0.25, 0.25, 0.125],
    ),
    "softmax over channels first": (
        lambda x: K.Softmax(axis=1)(x),
        "this one runs over another; write Permute((2, 3, 1)), Softmax() and Permute((3, 1, 2))",
        lambda x: K.Permute((3, 1, 2))(K.Softmax()(K.Permute((2, 3, 1))(x))),
    ),
    "softmax call over width": (
        lambda x: ops.softmax(x, axis=-2),
        "write Permute((1, 3, 2)), Softmax() and Permute((1, 3, 2))",
        lambda x: K.Permute((1, 3, 2))(K.Softmax()(K.Permute((1, 3, 2))(x))),
    ),
    "mean over channels": (
        lambda x: ops.mean(x, axis=-1, keepdims=True),
        "write Reshape((48, 5, 1)), AveragePooling2D((1, 5)) and Reshape((8, 6, 1))",
        by_channels(K.AveragePooling2D, (8, 6, 1)),
    ),
    "maximum over channels": (
        lambda x: ops.max(x, axis=3),
        "write Reshape((48, 5, 1)), MaxPooling2D((1, 5)) and Reshape((8, 6))",
        by_channels(K.MaxPooling2D, (8, 6)),
    ),
    "scaled sum": (
        scaled_sum,
        "(CustomScaleLayer) has no integer form. Write Add()([a, Rescaling(0.17)(b)]), for its "
        "tensors [a, b], instead",
        lambda x: K.Add()([x, K.Rescaling(0.17)(K.ReLU()(x))]),
    ),
    "one value for all channels": (
        lambda x: K.Add()([x, x[..., :1]]),
        "(height, width, 1) with Concatenate()([x] * channels)",
        lambda x: K.Add()([x, K.Concatenate()([x[..., :1]] * 5)]),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_refusals_say_to_write_computes_the_same_and_exports_exactly(name):
    refused, said, rewrite = SAID[name]
    old, new = between(refused), between(rewrite)
    (sentence,) = check(old)
    assert said in sentence
    new.layers[1].set_weights(old.layers[1].get_weights())
    # Float32 noise of sums in another order.
    np.testing.assert_allclose(
        new.predict(data(IMAGE), verbose=0), old.predict(data(IMAGE), verbose=0), atol=1e-5
    )
    for scheme in ("w8a8", "w4a4"):
        model = calibrate(quantize_model(new, scheme), data(IMAGE))
        assert convert(model, verify=data(IMAGE)).mismatches == 0


def from_pixels(prepare, dtype="float32"):
    inputs = keras.Input(IMAGE, dtype=dtype)
    x = K.Conv2D(4, 3, padding="same", activation="relu")(prepare(inputs))
    return keras.Model(inputs, K.Dense(2)(K.GlobalAveragePooling2D()(x)))


MEAN, DEVIATION = np.array([0.5, 0.25, 0.375]), np.array([0.5, 1.0, 0.2])


@pytest.mark.parametrize(
    ("prepare", "said", "rewrite"),
    [
        (
            lambda x: 1 - x / 255,
            "Got -1; use Normalization(mean=255, variance=65025) and behind it Rescaling(-1.0) for",
            lambda x: K.Rescaling(-1.0)(K.Normalization(mean=255.0, variance=65025.0)(x)),
        ),
        (
            lambda x: x / 255 - MEAN,
            "Use Normalization(mean=[127.5, 63.75, 95.625], variance=[65025, 65025, 65025]) for",
            K.Normalization(mean=[127.5, 63.75, 95.625], variance=[65025.0] * 3),
        ),
        (
            lambda x: (x / 255 - MEAN) / DEVIATION,
            "mean=[127.5, 63.75, 95.625], variance=[16256.25, 65025, 2601]) for that",
            K.Normalization(mean=[127.5, 63.75, 95.625], variance=[16256.25, 65025.0, 2601.0]),
        ),
        (
            K.Rescaling([1.0, 2.0, 4.0]),
            "Use Normalization(mean=[0, 0, 0], variance=[1, 0.25, 0.0625]) for that, or one number",
            K.Normalization(mean=[0.0] * 3, variance=[1, 0.25, 0.0625]),
        ),
    ],
    ids=["negative", "mean", "mean and deviation", "gain"],
)
def test_images_that_are_scaled_in_other_ways_are_normalized(prepare, said, rewrite):
    pixels = np.random.default_rng(0).integers(0, 256, (6, *IMAGE)).astype("float32")
    old, new = from_pixels(prepare), from_pixels(rewrite)
    (sentence,) = check(old)
    assert said in sentence
    new.set_weights(old.get_weights())
    # Float32 noise of 27 products of values up to 1020, and the 7 digits that are written.
    np.testing.assert_allclose(
        new.predict(pixels, verbose=0), old.predict(pixels, verbose=0), rtol=1e-4, atol=1e-4
    )
    model = calibrate(quantize_model(new, "w4a4"), pixels)
    assert convert(model, verify=pixels).mismatches == 0


@pytest.mark.parametrize(
    "factor", [0.0, np.inf, np.array([1.0, -1.0, 2.0]), np.array([1.0, 0.0, 2.0])]
)
def test_a_normalization_that_does_not_exist_is_not_offered(factor):
    (sentence,) = check(from_pixels(lambda x: x * factor))
    assert "Normalization(" not in sentence


def test_bytes_need_no_cast():
    pixels = np.random.default_rng(0).integers(0, 256, (6, *IMAGE)).astype("uint8")
    (sentence,) = check(from_pixels(lambda x: ops.cast(x, "float32") / 255, "uint8"))
    assert "Write Rescaling, which takes uint8 as it is, instead" in sentence
    model = calibrate(quantize_model(from_pixels(K.Rescaling(1 / 255), "uint8"), "w4a4"), pixels)
    assert convert(model, verify=pixels).mismatches == 0
