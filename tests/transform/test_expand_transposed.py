"""Transposed convolutions as convolutions over zeros: the same outputs, and exact files."""

import itertools

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit import calibrate, expand_transposed, freeze, quantize_model
from tflite_export import runtime

K = keras.layers
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 5, 4, 3)).astype("float32")


def answers(model, images=IMAGES):
    return np.array(keras.ops.convert_to_numpy(model(images, training=False)))


def test_one_row_by_hand():
    """1 2 3 by the kernel 1 10 100, stride 2: 1, 10, 100 + 2, 20, 200 + 3, 30, 300."""
    inputs = keras.Input((1, 3, 1))
    layer = K.Conv2DTranspose(1, (1, 3), (1, 2), use_bias=False, name="up")
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.float32([1, 10, 100]).reshape(1, 3, 1, 1)])
    expanded = expand_transposed(model)
    row = np.float32([1, 2, 3]).reshape(1, 1, 3, 1)
    assert answers(expanded, row).reshape(-1).tolist() == [1, 10, 102, 20, 203, 30, 300]
    assert type(expanded.get_layer("up")) is K.Conv2D


@pytest.mark.parametrize(("padding", "strides"), [*itertools.product(("same", "valid"), (1, 2, 3))])
def test_outputs_are_the_same(padding, strides):
    """Kernels shorter and longer than strides, even and odd, unlike along height and width."""
    for kernel in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 1)):
        inputs = keras.Input(IMAGES.shape[1:])
        x = K.Conv2DTranspose(
            2, kernel, (strides, 2), padding, activation="relu", bias_initializer="uniform"
        )(inputs)
        model = keras.Model(inputs, x)
        expanded = expand_transposed(model)
        assert expanded.output_shape == model.output_shape
        # Float32 noise of at most 60 products, each below 1.
        np.testing.assert_allclose(answers(expanded), answers(model), atol=60 * 2.0**-23)


def u_net():
    """Two steps up, the second by the layer of the first, a nested model, and a norm behind."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = kept = K.Conv2D(4, 3, padding="same", activation="relu", name="in")(inputs)
    x = K.Conv2D(4, 3, strides=4, padding="same", activation="relu", name="down")(x)
    up = K.Conv2DTranspose(4, 2, strides=2, padding="same", activation="relu", name="up")
    x = up(up(x))
    x = K.Concatenate(name="join")([x, kept])
    inside = keras.Input((8, 8, 8))
    y = K.Conv2DTranspose(4, 3, strides=2, padding="same", name="last")(inside)
    x = keras.Model(inside, K.ReLU()(K.BatchNormalization()(y)), name="head")(x)
    return keras.Model(inputs, K.Conv2D(2, 1, name="out")(x), name="net")


@pytest.mark.runtime
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w2a2", "wta8"])
def test_a_u_net_exports_exactly(scheme):
    images = np.random.default_rng(1).uniform(size=(4, 8, 8, 3)).astype("float32")
    model = u_net()
    expanded = expand_transposed(model)
    assert expanded.name == "net_expanded"
    # Float32 noise of sums in another order.
    np.testing.assert_allclose(answers(expanded, images), answers(model, images), atol=1e-5)
    small = calibrate(quantize_model(expanded, scheme), images)
    freeze(small)
    assert tflite_export.convert(small, verify=images).mismatches == 0


@pytest.mark.runtime
@pytest.mark.parametrize("strides", [(2, 3), (2, 1), (1, 2), (1, 1)])
def test_every_target_takes_the_file(strides):
    """Built-in kernels pad at most 5 axes, the Edge TPU's compiler knows the inner 3 of 4."""
    inputs = keras.Input(IMAGES.shape[1:])
    x = K.Conv2DTranspose(3, 4, strides, activation="relu", name="up")(inputs)
    expanded = expand_transposed(keras.Model(inputs, x))
    small = calibrate(quantize_model(expanded, "w8a8"), IMAGES)
    for target in ("android", "builtin", "coral"):
        assert tflite_export.check(small, target) == []
        result = tflite_export.convert(small, target, verify=IMAGES)
        assert result.mismatches == 0
        assert max(len(t.shape) for t in result.graph.tensors.values()) == 4
        feeds = {result.graph.inputs[0]: IMAGES}
        (wanted,) = runtime.run(result.content, feeds).values()
        (found,) = runtime.run(result.content, feeds, builtin_kernels=True).values()
        step = result.graph.tensors[result.graph.ops[-1].inputs[0]].scale
        # Built-in kernels may round a product otherwise, by one code.
        np.testing.assert_allclose(found, wanted, atol=1.01 * step)


@pytest.mark.parametrize("strides", [(3, 2), (2, 1), (1, 3)])
def test_zeros_stand_between_the_values(strides):
    """Bit for bit what numpy puts there."""
    inputs = keras.Input(IMAGES.shape[1:])
    x = K.Conv2DTranspose(1, 1, strides, padding="same", name="up")(inputs)
    expanded = expand_transposed(keras.Model(inputs, x))
    spread = keras.Model(expanded.input, expanded.get_layer("up").input)
    (n, h, w, c), (s, t) = IMAGES.shape, strides
    wanted = np.zeros((n, h * s, w * t, c), "float32")
    wanted[:, ::s, ::t] = IMAGES
    np.testing.assert_array_equal(answers(spread), wanted)


def doubled(x):
    return 2 * x


def test_an_activation_of_somebodys_own_goes_along():
    inputs = keras.Input(IMAGES.shape[1:])
    x = K.Conv2DTranspose(2, 3, strides=2, activation=doubled, name="up")(inputs)
    model = keras.Model(inputs, x)
    # Float32 noise of 27 products, doubled.
    np.testing.assert_allclose(answers(expand_transposed(model)), answers(model), atol=2e-5)


def test_the_copy_trains():
    x = np.random.default_rng(1).uniform(size=(8, 8, 8, 3)).astype("float32")
    small = calibrate(quantize_model(expand_transposed(u_net()), "w4a4"), x)
    small.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=keras.backend.backend() == "jax")
    targets = np.ones((8, 16, 16, 2), "float32")
    losses = small.fit(x, targets, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_it_is_named_as_the_way_out():
    (sentence, *_) = tflite_export.check(u_net())
    assert "up (Conv2DTranspose) has no integer form" in sentence
    assert "keras_lowbit.expand_transposed(model)" in sentence


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((5, 4, 3), {"dilation_rate": 2}, r"up has dilation_rate=\(2, 2\)"),
        ((5, 4, 3), {"strides": 2, "output_padding": 1}, r"up has output_padding="),
        ((None, 4, 3), {}, r"up has images of unknown size \(None, 4\)\. UpSampling2D and Conv2D"),
    ],
)
def test_what_cannot_be_expanded_is_refused(shape, options, said):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, K.Conv2DTranspose(2, 3, name="up", **options)(inputs))
    with pytest.raises(ValueError, match=said):
        expand_transposed(model)


def test_a_model_without_them_is_no_silent_success():
    inputs = keras.Input((5, 4, 3))
    with pytest.raises(ValueError, match="plain has no Conv2DTranspose"):
        expand_transposed(keras.Model(inputs, K.Conv2D(2, 3)(inputs), name="plain"))
