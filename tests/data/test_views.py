"""Random views of images: where their pixels come from."""

from __future__ import annotations

import numpy as np
import pytest

from keras_lowbit.data import zoomed_views

# value = 10 row + 100 column: bilinear interpolation gives it back at any place.
RAMP = (10.0 * np.arange(9)[:, None] + 100.0 * np.arange(7))[None, :, :, None].astype("float32")


def test_the_images_come_first_and_views_in_turns():
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    found = zoomed_views(images, 2)
    assert found.dtype == np.uint8
    assert found[:, 0, 0, 0].tolist() == [10, 20, 30] * 3


def test_a_view_is_a_window_of_the_image():
    views = zoomed_views(RAMP, 40, zoom=0.5, seed=3)[1:, :, :, 0]
    # float32 interpolation of values up to 700 errs by some 1e-4, and shares by a hundredth of it.
    down, across = np.diff(views, axis=1), np.diff(views, axis=2)
    np.testing.assert_allclose(down, np.broadcast_to(down[:, :1, :1], down.shape), atol=1e-3)
    np.testing.assert_allclose(across, np.broadcast_to(across[:, :1, :1], across.shape), atol=1e-3)
    # One share for both sides; mirrored views fall to the right.
    share, mirrored = down[:, 0, 0] / 10, across[:, 0, 0] < 0
    np.testing.assert_allclose(np.abs(across[:, 0, 0]) / 100, share, atol=1e-4)
    assert share.min() >= 0.5
    assert share.max() <= 1
    assert np.ptp(share) > 0.3
    assert 5 < mirrored.sum() < 35
    assert views.min() >= 0
    assert views.max() <= RAMP.max()


def test_no_zoom_and_no_flip_give_the_image():
    np.testing.assert_array_equal(zoomed_views(RAMP, 1, zoom=1.0, flip=False)[1], RAMP[0])


def test_pixels_stay_pixels():
    image = np.array([[[[0], [1], [2]]] * 3]).astype(np.uint8)
    views = zoomed_views(image, 30, zoom=0.5)
    assert set(np.unique(views)) <= {0, 1, 2}


def test_a_seed_gives_the_same_views():
    one, same, other = (zoomed_views(RAMP, 2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copies": -1}, "copies must be a whole number"),
        ({"copies": 1.5}, "copies must be a whole number"),
        ({"copies": 1, "zoom": 0.0}, "zoom must lie"),
        ({"copies": 1, "zoom": 1.5}, "zoom must lie"),
        ({"copies": 1, "images": RAMP[0]}, "must be"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        zoomed_views(**{"images": RAMP, **given})
