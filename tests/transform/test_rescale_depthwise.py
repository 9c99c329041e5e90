"""Rescaling of depthwise and pointwise pairs: factors by hand, functions that stay the same."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.transform.rescale_depthwise import (
    activation_factors,
    cle_factors,
    fat_factors,
    rescale_pairs,
    scaled_first,
    scaled_second,
)

K = keras.layers
RANDOM = np.random.default_rng(5)
IMAGES = RANDOM.normal(size=(6, 7, 5, 3)).astype("float32")


def net(activation="relu6", fused=False, multiplier=2, gain=0.3):
    """Depthwise, activation, pointwise, with channels of very different ranges."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((7, 5, 3))
    x = K.DepthwiseConv2D(
        3,
        padding="same",
        depth_multiplier=multiplier,
        activation=activation if fused else None,
        name="dw",
    )(inputs)
    if not fused:
        x = K.Activation(activation, name="act")(x)
    x = K.ZeroPadding2D(1)(x)
    x = K.Conv2D(4, 1, name="pw")(x)
    model = keras.Model(inputs, K.Dense(2, name="head")(K.GlobalAveragePooling2D()(x)))
    layer, random = model.get_layer("dw"), np.random.default_rng(7)
    kernel = random.normal(size=layer.kernel.shape)
    layer.kernel.assign(gain * kernel * np.exp(random.normal(size=kernel.shape[-2:])))
    layer.bias.assign(random.normal(size=layer.bias.shape))
    return model


def ranges(model):
    kernel = np.abs(ops.convert_to_numpy(model.get_layer("dw").kernel))
    return kernel.max(axis=(0, 1)).reshape(-1)


def outputs(model, x=IMAGES):
    return ops.convert_to_numpy(model(x))


def test_fat_factors_worked_by_hand():
    """Channels 0 and 1 reach 5.9 and are locked: T_a = (2 + 4) / 2 = 3.

    Channel 2: 3 / 1 = 3, and 3 * 1.5 = 4.5 is below 5.9. Channel 3: 3 / 0.5 = 6, but 5.9 / 2 = 2.95
    is the limit. Channel 4 has no positive value and so no limit; channel 5 no weight.
    """
    factors = fat_factors([2, 4, 1, 0.5, 0.1, 0], [5.9, 9, 1.5, 2, -1, 0], capped=True)
    np.testing.assert_allclose(factors, [1, 1, 3, 2.95, 30, 1])


def test_without_a_locked_channel_nothing_shrinks():
    np.testing.assert_allclose(fat_factors([2, 4, 1], [1, 1, 1], capped=True), [2, 1, 4])
    # A plain ReLU locks nothing, whatever its values; factors stay within 1e-2..1e2.
    np.testing.assert_allclose(fat_factors([1, 500], [99, 99], capped=False), [100, 1])


def test_cle_factors_give_both_sides_the_geometric_mean():
    """sqrt(8 * 2) / 8 = 0.5: ranges 8 * 0.5 = 4 and 2 / 0.5 = 4. A locked channel stays."""
    factors = cle_factors([8, 1, 3], [2, 9, 12], [0, 1, 6], capped=True)
    np.testing.assert_allclose(factors, [0.5, 3, 1])


def test_activation_factors_worked_by_hand():
    """Under a ReLU6 5.9 / 2 = 2.95 and 5.9 / 0.059 = 100; a channel at 6 and a dead one stay.

    Under a ReLU the largest channel, 8, is the aim: 8 / 2 = 4, by the square root 2.
    """
    factors = activation_factors([2, 0.059, 6, -1], capped=True)
    np.testing.assert_allclose(factors, [2.95, 100, 1, 1])
    np.testing.assert_allclose(activation_factors([8, 2], capped=False), [1, 4])
    np.testing.assert_allclose(activation_factors([8, 2], capped=False, share=0.5), [1, 2])


def test_activations_in_front_of_a_depthwise_layer_get_one_range_and_outputs_stay():
    keras.utils.set_random_seed(4)
    inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(4, 3, padding="same", activation="relu6", name="stem")(inputs)
    x = K.DepthwiseConv2D(3, padding="same", activation="relu6", name="dw")(x)
    model = keras.Model(inputs, K.Conv2D(2, 1, name="pw")(x))
    stem = model.get_layer("stem")
    kernel = np.random.default_rng(4).normal(size=stem.kernel.shape)
    stem.kernel.assign(0.2 * kernel * [0.1, 1.0, 0.05, 0.5])
    stem.bias.assign(np.float32([0.1, 0.2, 0.01, 0.1]))
    made = rescale_pairs(model, IMAGES, method="activations")
    # Float32 rounding of products of three kernels whose channels grew up to a hundredfold.
    np.testing.assert_allclose(outputs(made), outputs(model), atol=2e-5)
    values = ops.convert_to_numpy(keras.Model(made.input, made.get_layer("stem").output)(IMAGES))
    # Float32 rounding of the kernel, the bias and their sum.
    np.testing.assert_allclose(values.max(axis=(0, 1, 2)), 5.9, rtol=1e-5)


def test_rescaling_under_a_relu_is_exact_in_float64():
    """Depthwise output channel c m + j is kernel [..., c, j]; 1e-15 is float64's rounding."""
    x = RANDOM.normal(size=(50, 3))  # a 1 x 1 depthwise layer: channel by channel
    kernel, bias = RANDOM.normal(size=(1, 1, 3, 2)), RANDOM.normal(size=6)
    second = RANDOM.normal(size=(1, 1, 6, 4))
    factors = np.exp(RANDOM.normal(size=6))

    def run(kernel, bias, second):
        hidden = (x[:, :, None] * kernel[0, 0]).reshape(-1, 6) + bias
        return np.maximum(hidden, 0) @ second[0, 0]

    want = run(kernel, bias, second)
    moved = scaled_first(kernel, bias, factors, depthwise=True)
    got = run(*moved, scaled_second(second, factors))
    assert np.abs(got - want).max() <= 8e-15 * np.abs(want).max()


@pytest.mark.parametrize("method", ["fat", "cle"])
@pytest.mark.parametrize(
    ("activation", "fused"),
    [("relu", False), ("relu6", False), ("relu6", True), (K.ReLU(6.0), True)],
)
def test_outputs_on_the_calibration_images_stay(method, activation, fused):
    model = net(activation, fused)
    before = [w.copy() for w in model.get_weights()]
    made, report = rescale_pairs(model, IMAGES, method=method, batch_size=4, return_report=True)
    want = outputs(model)
    # float32 sums in another order of magnitude.
    np.testing.assert_allclose(outputs(made), want, atol=1e-5 * np.abs(want).max())
    assert not np.allclose(report.factors["dw", "pw"], 1)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_relu6_that_saturates_locks_its_channels():
    _, report = rescale_pairs(net(gain=1.0), IMAGES, return_report=True)
    factors = report.factors["dw", "pw"]
    assert 1 < (factors == 1).sum() < len(factors)


def test_fat_equalizes_the_depthwise_kernel():
    made = rescale_pairs(net("relu"), IMAGES)
    # float32 products of float64 factors.
    assert np.ptp(ranges(made)) < 1e-5 * ranges(made).max()


def test_cle_settles_with_equal_ranges_on_both_sides():
    made = rescale_pairs(net("relu"), IMAGES, method="cle")
    second = np.abs(ops.convert_to_numpy(made.get_layer("pw").kernel)).max(axis=(0, 1, 3))
    # Rounds end when no factor moves by more than 1e-3; pw is rebalanced against the head after.
    np.testing.assert_allclose(ranges(made), second, rtol=3e-3)


def test_the_default_method_says_that_it_wants_depthwise_layers():
    x = inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(2, 1, name="second")(K.Conv2D(4, 3, activation="relu", name="first")(x))
    model = keras.Model(inputs, x, name="plain")
    said = r"plain has no DepthwiseConv2D, which method='fat' is for; 'cle' .*any two products"
    with pytest.raises(ValueError, match=said):
        rescale_pairs(model, IMAGES)
    assert rescale_pairs(model, IMAGES, method="cle") is not model
    one = keras.Model(inputs, K.Flatten()(inputs), name="none")
    with pytest.raises(ValueError, match="none has no Conv2D, DepthwiseConv2D or Dense"):
        rescale_pairs(one, IMAGES, method="cle")


def test_pairs_that_cannot_be_rescaled_are_named():
    inputs = keras.Input((7, 5, 3))
    x = K.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    x = K.Add()([x, inputs])
    x = K.DepthwiseConv2D(3, name="dw2")(x)
    x = K.Conv2D(2, 1, name="pw2")(K.Activation("swish", name="swish")(x))
    x = K.DepthwiseConv2D(3, name="dw3")(x)
    model = keras.Model(inputs, K.Conv2D(2, 1, name="pw3")(K.BatchNormalization(name="bn")(x)))
    with pytest.raises(ValueError, match="no pair to rescale") as error:
        rescale_pairs(model, IMAGES)
    text = str(error.value)
    for why in ("'dw1': 'add", "swish is silu", "bn (BatchNormalization) stands behind it"):
        assert why in text


@pytest.mark.parametrize("method", ["fat", "cle"])
def test_a_grouped_reader_is_named(method):
    """Its kernel's input channels are those of a group: channel 0 of it reads dw's 0, 1 and 2."""
    inputs = keras.Input((7, 5, 3))
    x = K.DepthwiseConv2D(3, name="dw")(inputs)
    model = keras.Model(inputs, K.Conv2D(6, 1, groups=3, name="grouped")(x))
    with pytest.raises(ValueError, match=r"no pair to rescale .*'dw': 'grouped has groups'"):
        rescale_pairs(model, IMAGES, method=method)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"method": "dfq"}, "method must be one of"), ({"limit": 6.0}, "between 0 and 6")],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        rescale_pairs(net(), IMAGES, **options)


@pytest.mark.parametrize(("name", "argument"), [("dw", "depthwise"), ("pw", "kernel")])
def test_layers_with_constraints_are_left_alone(name, argument):
    model = net()
    layer = model.get_layer(name)
    changed = {f"{argument}_constraint": "unit_norm"}

    def clone(old):
        return type(old).from_config({**old.get_config(), **(changed if old is layer else {})})

    constrained = keras.models.clone_model(model, clone_function=clone)
    with pytest.raises(ValueError, match=rf"{name} has a {argument}_constraint, which resc"):
        rescale_pairs(constrained, IMAGES)
