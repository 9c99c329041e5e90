"""Cutout and mixup: pixels and targets worked by hand, and batches that repeat."""

import numpy as np
import pytest

from keras_lowbit.data import AugmentedBatches
from keras_lowbit.data.mixing import cut_out, mix_up

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("row", "column", "side", "zeros"),
    [
        (2, 2, 3, {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}),
        (2, 2, 2, {(1, 1), (1, 2), (2, 1), (2, 2)}),
        (0, 4, 3, {(0, 3), (0, 4), (1, 3), (1, 4)}),
        (4, 0, 1, {(4, 0)}),
        (0, 0, 20, {(r, c) for r in range(5) for c in range(5)}),
    ],
)
def test_a_square_is_cut_out_and_ends_at_the_border(row, column, side, zeros):
    images = np.ones((2, 5, 5, 2), np.uint8)
    # The other image's square is far away, and only there.
    cut_out(images, np.array([row, 4]), np.array([column, 4]), side)
    assert {tuple(place) for place in np.argwhere(images[0, :, :, 0] == 0)} == zeros
    np.testing.assert_array_equal(images[..., 0], images[..., 1])


def test_a_mixture_by_hand():
    images = np.uint8([[0], [10], [255]]).reshape(3, 1, 1, 1)
    targets = np.eye(3, dtype=np.float32)
    mixed, probabilities = mix_up(images, targets, np.array([1, 2, 0]), np.array([0.25, 1.0, 0.5]))
    # 7.5 and 127.5 go to the even neighbours.
    assert (mixed.dtype, mixed.ravel().tolist()) == (np.uint8, [8, 10, 128])
    np.testing.assert_array_equal(
        probabilities, np.float32([[0.25, 0.75, 0], [0, 1, 0], [0.5, 0, 0.5]])
    )
    assert probabilities.dtype == np.float32


def test_reals_are_not_rounded():
    images = np.float32([0.5, 1.0]).reshape(2, 1, 1, 1)
    mixed, _ = mix_up(images, np.eye(2), np.array([1, 0]), np.array([0.5, 0.75]))
    np.testing.assert_array_equal(mixed.ravel(), np.float32([0.75, 0.875]))


def batches(**options):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (12, 6, 6, 3)).astype(np.uint8)
    targets = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 12)]
    return AugmentedBatches(images, targets, 4, pad=0, flip=False, **options)


def test_batches_are_cut_and_mixed_and_repeat():
    one, two = batches(cutout=3, mixup=1.0), batches(cutout=3, mixup=1.0)
    plain = batches()
    for index in range(3):
        (x, y), (again, y_again), (clear, labels) = one[index], two[index], plain[index]
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(y, y_again)
        assert x.dtype == clear.dtype
        assert (x != clear).any()
        # A share and 1 minus it, each rounded to float32.
        np.testing.assert_allclose(y.sum(axis=1), 1.0, rtol=1e-6)
        # Never a class that no image of the batch has.
        assert not y[:, labels.sum(axis=0) == 0].any()


def test_without_them_batches_are_what_they_were():
    np.testing.assert_array_equal(batches(cutout=0, mixup=0.0)[1][0], batches()[1][0])


@pytest.mark.parametrize("options", [{"cutout": -1}, {"mixup": -0.1}, {"mixup": float("nan")}])
def test_what_is_negative_is_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}.* must be .*(at least 0|0 or more)"):
        batches(**options)


def test_labels_cannot_be_mixed():
    with pytest.raises(ValueError, match="to_categorical"):
        AugmentedBatches(np.zeros((4, 2, 2, 1)), np.arange(4), 2, mixup=0.5)
