"""Streams: where they are kept, and their error."""

import numpy as np
import pytest

from keras_lowbit.tuning.streams import Stream, relative_error, variance

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
