import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.transform.reestimate import reestimate_batchnorm


def small(**norm):
    """Two batch norms on one feature, a dropout between."""
    inputs = keras.Input((1,))
    x = keras.layers.BatchNormalization(name="a", epsilon=0.0, **norm)(inputs)
    x = keras.layers.Dropout(0.5)(x)
    return keras.Model(inputs, keras.layers.BatchNormalization(name="b", epsilon=0.0)(x))


def of(model, name):
    layer = model.get_layer(name)
    return [float(ops.convert_to_numpy(v)[0]) for v in (layer.moving_mean, layer.moving_variance)]


def single():
    """One batch norm on one feature."""
    inputs = keras.Input((1,))
    return keras.Model(inputs, keras.layers.BatchNormalization(name="a")(inputs))


# Batches (0, 2), (4, 8) and the single image 10: means 1, 6, 10 and variances 1, 4, 0.
X = np.array([[0.0], [2.0], [4.0], [8.0], [10.0]], "float32")


def test_statistics_are_the_means_over_batches():
    model = small()
    # Without the single image, which has no variance to divide by.
    reestimate_batchnorm(model, X[:4], batch_size=2)
    assert of(model, "a") == [3.5, 2.5]
    # What `a` hands on is (-1, 1) in both batches, whatever its moving statistics, and
    # dropout is off.
    assert of(model, "b") == [0.0, 1.0]


def test_batches_weigh_the_same_and_steps_cuts_them():
    model = single()
    reestimate_batchnorm(model, X, batch_size=2)
    assert of(model, "a") == [np.float32((1 + 6 + 10) / 3), np.float32((1 + 4 + 0) / 3)]
    reestimate_batchnorm(model, X, batch_size=2, steps=1)
    assert of(model, "a") == [1.0, 1.0]


class Endless(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X[:2] + 4 * index, np.zeros(2)


def generator():
    while True:
        yield X[:2]


def test_data_sets_with_targets_and_endless_ones_are_taken():
    model = single()
    reestimate_batchnorm(model, Endless(workers=0))
    assert of(model, "a") == [3.0, 1.0]
    reestimate_batchnorm(model, generator(), steps=3)
    assert of(model, "a") == [1.0, 1.0]


def test_broken_statistics_do_not_reach_the_new_ones():
    model = small()
    model.get_layer("a").moving_mean.assign([np.nan])
    reestimate_batchnorm(model, X[:2], batch_size=2)
    assert of(model, "a") == [1.0, 1.0]


def test_an_error_on_the_way_leaves_everything_as_it_was(monkeypatch):
    model = small(momentum=0.75)
    model.get_layer("a").moving_mean.assign([7.0])
    runs = []

    def broken(batches, _):
        yield batches[0]
        runs.append(of(model, "a"))
        raise RuntimeError("on the way")

    monkeypatch.setattr("keras_lowbit.transform.reestimate.track", broken)
    with pytest.raises(RuntimeError, match="on the way"):
        reestimate_batchnorm(model, X[:2], batch_size=2)
    assert runs == [[1.0, 1.0]]  # the batch's own statistics were in the layer
    assert of(model, "a") == [7.0, 1.0]
    assert model.get_layer("a").momentum == 0.75


def test_momentum_comes_back_and_fixed_batch_norms_keep_what_they_have():
    model = small(momentum=0.75)
    model.get_layer("b").trainable = False
    reestimate_batchnorm(model, X[:2], batch_size=2)
    assert model.get_layer("a").momentum == 0.75
    assert of(model, "b") == [0.0, 1.0]
    model.get_layer("b").moving_mean.assign([5.0])
    reestimate_batchnorm(model, X[:2], batch_size=2)
    assert of(model, "b") == [5.0, 1.0]


def test_a_shared_layer_averages_over_its_calls():
    first, second = keras.Input((1,)), keras.Input((1,))
    norm = keras.layers.BatchNormalization(name="a")
    model = keras.Model([first, second], [norm(first), norm(second)])
    reestimate_batchnorm(model, [X[:2], X[2:4]])
    assert of(model, "a") == [3.5, 2.5]


@pytest.mark.parametrize(
    ("data", "steps", "message"),
    [
        (X[:0], None, "No images"),
        (X, 0, "steps must be a whole number of at least 1. Got 0"),
        (np.zeros((2, 3), "float32"), None, "must have shape"),
        (X * np.nan, None, "NaN"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data, steps, message):
    with pytest.raises(ValueError, match=message):
        reestimate_batchnorm(small(), data, steps=steps)


def test_a_model_without_batch_norms_comes_back_as_it_is():
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert reestimate_batchnorm(model, X) is model
