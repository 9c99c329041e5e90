"""What calls are taken for: names that look alike are not."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import NotExportable, calibrate, quantize_model
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.kinds import activation_name, kind_of
from keras_lowbit.walk import flatten

K = keras.layers


def hard_sigmoid(x):
    """TensorFlow 1's: another slope than Keras 3's x / 6 + 0.5."""
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


class ReLU(K.Layer):
    """Named as one of Keras'."""

    def call(self, inputs):
        return ops.relu(inputs) - 1.0


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (None, "linear"),
        ("linear", "linear"),
        ("relu", "relu"),
        (keras.activations.hard_sigmoid, "hard_sigmoid"),
        ("swish", "silu"),
        (ops.silu, "silu"),
        (K.ReLU(6.0), "relu6"),
        (K.LeakyReLU(0.1), "leaky_relu"),
        (K.LeakyReLU(1.0), "linear"),  # x on either side of 0
        (K.LeakyReLU(1.5), "relu_variant"),
        ("gelu", "gelu"),
        (K.ELU(), "ELU"),
        (K.PReLU(), "PReLU"),
    ],
)
def test_the_activation_of_a_layer_has_its_name(activation, name):
    assert activation_name(K.Conv2D(1, 1, activation=activation)) == name
    assert activation_name(K.Activation(activation)) == name


@pytest.mark.parametrize("activation", [hard_sigmoid, functools.partial(ops.relu), ReLU()])
def test_what_is_only_called_like_an_activation_of_keras_is_none_of_them(activation):
    found = activation_name(K.Dense(1, activation=activation))
    assert found not in ("linear", "relu", "hard_sigmoid")
    assert any(name in found for name in ("hard_sigmoid", "partial", "ReLU"))


@pytest.mark.parametrize("activation", [K.ELU(), hard_sigmoid])
def test_an_activation_without_an_integer_form_is_refused_by_its_name(activation):
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1, activation=activation, name="c")(inputs)
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    small = calibrate(quantize_model(model), np.ones((1, 4, 4, 2), np.float32))
    with pytest.raises(NotExportable, match=r"c: activation '.*(ELU|hard_sigmoid)' has no exact"):
        integer_graph(small)


@pytest.mark.parametrize(
    ("shape", "axis", "name"),
    [
        ((4, 3), -1, "softmax"),
        ((4, 3), 2, "softmax"),
        ((4, 3), 1, "softmax_variant"),
        ((3,), 1, "softmax"),
        ((4, 3), (1, 2), "softmax_variant"),
        ((4, 3), None, "softmax_variant"),
    ],
)
def test_a_softmax_is_one_over_the_last_axis(shape, axis, name):
    inputs = keras.Input(shape)
    outputs = [ops.softmax(inputs, axis=axis)] + ([] if axis is None else [K.Softmax(axis)(inputs)])
    calls = flatten(keras.Model(inputs, outputs)).calls
    assert {activation_name(call.operation) for call in calls} == {name}


def test_a_softmax_over_another_axis_is_refused_by_name():
    inputs = keras.Input((4, 4, 2))
    x = ops.softmax(K.Conv2D(2, 1, name="c")(inputs), axis=1)
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    small = calibrate(quantize_model(model), np.ones((1, 4, 4, 2), np.float32))
    with pytest.raises(NotExportable, match="softmax: only a softmax over the last axis"):
        integer_graph(small)


def test_a_layer_shared_by_tensors_of_other_ranks_is_the_last_axis_only_where_it_is():
    """The same axis 1 is the last of one tensor and not of the other."""
    first, second = keras.Input((3,)), keras.Input((4, 3))
    layer = K.Softmax(1, name="s")
    tall = K.Dense(3, name="tall")(second)
    model = keras.Model([first, second], [layer(K.Dense(3)(first)), layer(tall)])
    data = [np.ones((1, 3), np.float32), np.ones((1, 4, 3), np.float32)]
    small = calibrate(quantize_model(model), data)
    with pytest.raises(NotExportable, match="only a softmax over the last axis"):
        integer_graph(small)


@pytest.mark.parametrize(("value", "kind"), [(None, "pad"), (0.0, "pad"), (3.0, "filled_pad")])
@pytest.mark.parametrize("by_position", [False, True])
def test_padding_with_another_number_than_zero_does_not_move_codes(value, kind, by_position):
    inputs = keras.Input((4, 4, 2))
    widths = [(0, 0), (1, 1), (1, 1), (0, 0)]
    if by_position:
        x = ops.pad(inputs, widths, "constant", value)
    else:
        x = ops.pad(inputs, widths, constant_values=value)
    (call,) = flatten(keras.Model(inputs, x)).calls
    assert kind_of(call) == kind


def test_padding_with_threes_stays_three_in_training():
    """Two readers put `x` on a grid of its own, 0..1, whose codes have no three."""
    inputs = keras.Input((1, 2, 1))
    x = K.ReLU()(K.Conv2D(1, 1, use_bias=False)(inputs))
    widths = [(0, 0), (0, 0), (1, 1), (0, 0)]
    y = K.Conv2D(1, 1, use_bias=False)(ops.pad(x, widths, constant_values=3.0))
    model = keras.Model(inputs, [y, K.Conv2D(1, 1, use_bias=False)(x)])
    model.set_weights([np.ones(w.shape, np.float32) for w in model.weights])
    images = np.array([1.0, 0.25], np.float32).reshape(1, 1, 2, 1)
    small = calibrate(quantize_model(model), images)
    found = ops.convert_to_numpy(small(images)[0]).reshape(-1)
    np.testing.assert_allclose(found, [3, 1, 0.25, 3], atol=0.02)  # a step and a half of 3 / 255
    with pytest.raises(NotExportable, match="only zero padding is supported"):
        integer_graph(small)
