"""Data sets with and without an end, in the forms that `calibrate` reads them in."""

import sys

import keras
import numpy as np
import pytest

from keras_lowbit import walk
from keras_lowbit.transform.batches import CheckedBatches, checked_batches

pytestmark = pytest.mark.once
NO_END = "no end: say how many batches to read by steps="


@pytest.fixture(scope="module")
def program():
    return walk.flatten(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))


class Numbered(keras.utils.PyDataset):
    """Batches of four images that hold their number."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, index):
        return np.full((4, 2), index, "float32"), np.zeros(4)


class LikeGrain:
    """What `MapDataset.repeat()` of grain is: a length, the greatest there is, and no end."""

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, index):
        return np.full((4, 2), index, "float32")


@pytest.mark.parametrize("endless", [Numbered(None), LikeGrain()])
def test_of_a_data_set_without_end_as_many_batches_are_read_as_asked_for(program, endless):
    batches = CheckedBatches(program, endless, None, steps=3)
    assert (len(batches), batches.images) == (3, 12)
    assert [x[0, 0] for (x,) in batches] == [0, 1, 2]


@pytest.mark.parametrize("endless", [Numbered(None), LikeGrain()])
def test_a_data_set_without_end_needs_steps(program, endless):
    with pytest.raises(ValueError, match=NO_END):
        CheckedBatches(program, endless, None)


@pytest.mark.parametrize(("steps", "count"), [(None, 2), (1, 1), (5, 2)])
def test_a_data_set_that_says_its_length_to_keras_alone_is_read_to_its_end(program, steps, count):
    assert len(checked_batches(program, Numbered(2), None, steps)) == count
