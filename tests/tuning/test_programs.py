"""Programs of two models of one origin: what their logits are."""

import keras
import numpy as np
import pytest

from keras_lowbit import walk
from keras_lowbit.tuning import programs

K = keras.layers


@pytest.mark.parametrize("activation", ["softmax", "a layer"])
def test_logits_are_what_stands_before_a_softmax_that_a_layer_ends_with(activation):
    # A layer cannot give its place to a function: PyTorch holds it as a module.
    given = K.Softmax() if activation == "a layer" else activation
    inputs = keras.Input((3,))
    model = keras.Model(inputs, K.Dense(2, activation=given)(inputs))
    kernel, bias = np.float32([[1, 0], [0, 2], [1, 1]]), np.float32([0.5, -0.5])
    model.layers[-1].set_weights([kernel, bias])
    x = np.float32([[1, 2, 3], [0, -1, 4]])
    (found,) = programs.forward(programs.logits(walk.flatten(model)), [x])
    np.testing.assert_array_equal(found, x @ kernel + bias)  # whole and half numbers
    # And the layer is as it was.
    np.testing.assert_allclose(model.predict(x, verbose=0).sum(axis=1), 1.0, rtol=1e-6)  # float32
