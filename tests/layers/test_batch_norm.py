"""Batch normalization by the faster forms: Keras' layer is what it must equal."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb
from keras_lowbit import layers
from keras_lowbit.numerics import backend
from tests.numerics.test_backend import gradient, only_tensorflow, only_torch, run

OPTIONS = [{}, {"center": False}, {"scale": False}, {"epsilon": 0.5, "momentum": 0.3}]
SHAPES = [(4, 5, 3, 6), (2, 1, 1, 3), (1, 3, 2, 1), (1, 1, 1, 2)]


def pair(shape, **options):
    """Keras' layer and ours with the same weights."""
    rng = np.random.default_rng(3)
    made = []
    for cls in (keras.layers.BatchNormalization, layers.BatchNormalization):
        layer = cls(**options)
        layer.build(shape)
        made.append(layer)
    values = [rng.uniform(0.5, 2.0, w.shape) * rng.choice([-1, 1]) for w in made[0].weights[:-1]]
    values.append(rng.uniform(0.5, 2.0, made[0].weights[-1].shape))
    for layer in made:
        layer.set_weights(values)
    return made


def images(shape):
    return np.random.default_rng(0).normal(3.0, 2.0, shape).astype("float32")


def moving(layer):
    return [ops.convert_to_numpy(v) for v in (layer.moving_mean, layer.moving_variance)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_moving_moments_are_those_of_keras(shape, options):
    theirs, ours = pair(shape, **options)
    x = images(shape)
    want = run(lambda t: theirs(t, training=True), x)
    got = run(lambda t: ours(t, training=True), x)
    # Moments of few values of size 3: summed in another order, divided by a small deviation.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(moving(ours), moving(theirs), strict=True):
        # Sums of up to 60 float32 in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_keras(options):
    shape = (4, 5, 3, 6)
    g = np.random.default_rng(1).normal(size=shape).astype("float32")
    found = []
    for layer in pair(shape, **options):
        scale = None if layer.gamma is None else ops.convert_to_numpy(layer.gamma)
        shift = None if layer.beta is None else ops.convert_to_numpy(layer.beta)
        given = [v for v in (scale, shift) if v is not None]

        def loss(x, *parts, layer=layer):
            names = [n for n in ("gamma", "beta") if getattr(layer, n) is not None]
            state = dict(zip(names, parts, strict=True))
            made = backend.batch_norm(x, state.get("gamma"), state.get("beta"), layer.epsilon)
            if made is None or type(layer) is keras.layers.BatchNormalization:
                mean, variance = ops.moments(x, axes=(0, 1, 2))
                made = (
                    ops.batch_normalization(
                        x,
                        mean,
                        variance,
                        -1,
                        offset=state.get("beta"),
                        scale=state.get("gamma"),
                        epsilon=layer.epsilon,
                    ),
                )
            return ops.sum(made[0] * ops.convert_to_tensor(g))

        found.append(gradient(loss, images(shape), *given))
    for want, got in zip(*found, strict=True):
        # Differences of sums over the batch: their rounding is of the size of the largest.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()))


def test_worked_by_hand():
    """x = 1, 3: mean 2, variance 1 (not 2); gamma 2, beta 5 and no epsilon: 3 and 7.

    Moving moments from 0 and 1 with momentum 0.75: 0.25 * 2 and 0.75 * 1 + 0.25 * 1. A gradient
    (1, 0) gives x nothing: two values always normalize to -1 and 1.
    """
    layer = layers.BatchNormalization(momentum=0.75, epsilon=0.0)
    x = np.float32([1.0, 3.0]).reshape(2, 1, 1, 1)
    layer.build(x.shape)
    layer.gamma.assign([2.0])
    layer.beta.assign([5.0])
    np.testing.assert_allclose(run(lambda t: layer(t, training=True), x).ravel(), [3.0, 7.0])
    np.testing.assert_allclose(np.ravel(moving(layer)), [0.5, 1.0])
    (to_x,) = gradient(lambda t: layer(t, training=True)[0, 0, 0, 0], x)
    # Terms of size 1 that cancel, in float32.
    np.testing.assert_allclose(to_x, np.zeros_like(x), atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_or_not_in_training_it_is_keras_layer_bit_for_bit(training):
    theirs, ours = pair((2, 3, 3, 4))
    theirs.trainable = ours.trainable = not training
    x = images((2, 3, 3, 4))
    want = run(lambda t: theirs(t, training=training), x)
    before = moving(ours)
    np.testing.assert_array_equal(run(lambda t: ours(t, training=training), x), want)
    for a, b in zip(moving(ours), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (6, 4)),
        ({"axis": 1}, (2, 4, 3, 3)),
        ({"renorm": True}, (2, 3, 3, 4)),
        ({"dtype": "mixed_float16"}, (2, 3, 3, 4)),
    ],
)
def test_what_the_fast_forms_do_not_cover_is_keras_layer(options, shape):
    theirs, ours = pair(shape, **options)
    x = images(shape)
    want = run(lambda t: ops.cast(theirs(t, training=True), "float32"), x)
    got = run(lambda t: ops.cast(ours(t, training=True), "float32"), x)
    np.testing.assert_array_equal(got, want)


@only_tensorflow
def test_is_one_operation_on_tensorflow():
    import tensorflow as tf

    _, ours = pair((2, 3, 3, 4))

    def kinds(**options):
        function = tf.function(lambda t: ours(t, training=True), autograph=False, **options)
        graph = function.get_concrete_function(tf.TensorSpec((None, 3, 3, 4))).graph
        return {op.type for op in graph.get_operations()}

    assert "FusedBatchNormV3" in kinds()
    assert "FusedBatchNormV3" not in kinds(jit_compile=True)


@only_torch
def test_is_one_operation_on_pytorch():
    _, ours = pair((2, 3, 3, 4))
    out = ours(images((2, 3, 3, 4)), training=True)
    names, node = [], out.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert any("BatchNormBackward" in name for name in names)


def test_quantized_models_have_it_and_it_travels(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.5, epsilon=0.01, name="bn")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    net = keras.Model(inputs, keras.layers.Dense(2)(x))
    net.get_layer("bn").set_weights([np.full(4, v, "float32") for v in (1.5, -0.5, 0.25, 2.0)])
    x = images((4, 8, 8, 3))
    model = klb.quantize_model(net)
    norm = model.get_layer("bn")
    assert type(norm) is layers.BatchNormalization
    assert norm.get_config() == net.get_layer("bn").get_config()
    for a, b in zip(norm.get_weights(), net.get_layer("bn").get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    klb.calibrate(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("bn")) is layers.BatchNormalization
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
