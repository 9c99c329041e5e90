"""Average pools: the same means on every backend, and in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import NotExportable, calibrate, layers, quantize_model
from keras_lowbit.integer.build import integer_graph


def row(values):
    return np.array(values, np.float32).reshape(1, 1, -1, 1)


@pytest.mark.parametrize(
    ("size", "pool", "stride", "expected"),
    [
        (5, 3, 3, [1.0, 3.5]),  # windows 0 1 2 and 3 4: one position behind is padding
        (4, 3, 2, [1.0, 2.5]),  # 0 1 2 and 2 3
        (4, 3, 1, [0.5, 1.0, 2.0, 2.5]),  # as much padding on both sides
        (4, 4, 1, [1.0, 1.5, 2.0, 2.5]),  # 0 1 2, 0 1 2 3, 1 2 3 and 2 3
        (4, 2, 2, [0.5, 2.5]),  # no padding
    ],
)
def test_a_window_over_the_border_takes_the_mean_of_what_it_sees(size, pool, stride, expected):
    layer = layers.AveragePooling2D((1, pool), (1, stride), padding="same")
    found = ops.convert_to_numpy(layer(row(range(size)))).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32


def test_without_padding_it_is_the_layer_of_keras():
    x = np.random.default_rng(0).random((2, 5, 6, 3), np.float32)
    ours = layers.AveragePooling2D(2, padding="valid")(x)
    theirs = keras.layers.AveragePooling2D(2, padding="valid")(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


def test_a_quantized_model_pools_so():
    inputs = keras.Input((5, 5, 2))
    x = keras.layers.AveragePooling2D(3, padding="same", name="pool")(
        keras.layers.Conv2D(2, 1)(inputs)
    )
    small = quantize_model(keras.Model(inputs, x))
    assert type(small.get_layer("pool")) is layers.AveragePooling2D


def test_a_pool_that_repeats_the_border_is_refused_by_name(backend):
    if backend != "torch":
        pytest.skip("the other backends do not")
    inputs = keras.Input((5, 5, 2))
    x = ops.average_pool(keras.layers.Conv2D(2, 1)(inputs), 3, 3, "same")
    small = quantize_model(keras.Model(inputs, keras.layers.Flatten()(x)))
    calibrate(small, np.ones((1, 5, 5, 2), np.float32))
    with pytest.raises(NotExportable, match=r"average_pool: on PyTorch .*layers.AveragePooling2D"):
        integer_graph(small)
