"""Streams: where they are kept, and their error."""

import keras
import numpy as np
import pytest

from keras_lowbit import walk
from keras_lowbit.tuning.streams import Given, Stream, propagate, relative_error, variance

pytestmark = pytest.mark.once

X = np.random.default_rng(0).normal(size=(50, 7, 3)).astype("float32")


@pytest.mark.parametrize(
    ("budget", "place", "error"),
    # float16 rounds by 2^-11 of the value.
    [(4 * X.size, "float32", 0), (4 * X.size - 1, "float16", 2**-11), (1, "disk", 2**-11)],
)
def test_a_stream_takes_the_form_that_its_budget_asks_for(budget, place, error):
    stream = Stream(X.shape, budget)
    assert stream.place == place
    for start in range(0, 50, 16):
        stream.write(start, X[start : start + 16])
    got = stream[np.array([3, 4, 40])]
    assert got.dtype == np.float32
    assert np.abs(got / X[[3, 4, 40]] - 1).max() <= error
    stream.close()


def test_values_beyond_float16_are_refused():
    stream = Stream((1, 2), 1)
    for bad in (7e4, np.nan):
        with pytest.raises(ValueError, match="raise `memory`"):
            stream.write(0, np.float32([[0, bad]]))


def test_variance_and_relative_error_by_hand():
    """0, 2, 4, 6: variance 5. Off by 1 everywhere: 1 / 5."""
    streams = [Stream((4, 1), 1e9) for _ in range(2)]
    wanted = np.float32([[0], [2], [4], [6]])
    streams[0].write(0, wanted)
    streams[1].write(0, wanted + 1)
    assert variance(streams[0], rows=3) == 5
    assert relative_error(streams[:1], streams[1:], [5.0], rows=3) == pytest.approx(0.2)


def test_relative_error_of_the_first_images_alone():
    """Off by 1, 3, 5, 7: the first three give (1 + 9 + 25) / 3, over a variance of 5."""
    streams = [Stream((4, 1), 1e9) for _ in range(2)]
    streams[0].write(0, np.zeros((4, 1), "float32"))
    streams[1].write(0, np.float32([[1], [3], [5], [7]]))
    got = relative_error(streams[:1], streams[1:], [5.0], limit=3, rows=2)
    assert got == pytest.approx(35 / 3 / 5)
    some = Stream((3, 1), 1e9)
    some.write(0, np.float32([[1], [3], [5]]))
    assert relative_error(streams[:1], [some], [5.0], limit=3) == got


def test_propagate_stops_behind_the_first_images():
    inputs = keras.Input((2,))
    outputs = keras.layers.Rescaling(2.0)(inputs)
    program = walk.flatten(keras.Model(inputs, outputs))
    given = np.arange(10, dtype="float32").reshape(5, 2)
    (got,) = propagate(program, [Given(given)], 2, 1e9, limit=3)
    np.testing.assert_array_equal(got[:], 2 * given[:3])
