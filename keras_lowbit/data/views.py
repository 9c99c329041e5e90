"""Further views of a few images, in NumPy: zoomed in, moved, mirrored."""

from __future__ import annotations

import numpy as np

from keras_lowbit.checks import checked_count


def zoomed_views(
    images: np.ndarray, copies: int, *, zoom: float = 0.6, flip: bool = True, seed: int = 0
) -> np.ndarray:
    """The images, and behind them `copies` random views of each.

    A view is a window of one share of both sides, drawn from `zoom..1`, at a random place, brought
    back to the image's size by bilinear interpolation; half of them are mirrored left and right.
    A model that is tuned on a few hundred images to answer as its float model does learns their
    noise otherwise.

    Args:
        images: `(n, height, width, channels)`; whole numbers are rounded, half to even, so pixels
            stay pixels.
        copies: views of each image, 0 or more.
        zoom: smallest share of a side, above 0 up to 1.
        flip: whether to mirror.
        seed: of the draws.

    Returns:
        `(n * (1 + copies), height, width, channels)` in the dtype of `images`: the images, then
        one view of each, then another of each.

    Raises:
        ValueError: arguments out of range, or images of another rank.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"zoomed_views: images must be (n, h, w, c). Got shape {images.shape}")
    copies = checked_count(copies, who="zoomed_views: copies", least=0)
    if not 0 < zoom <= 1:
        raise ValueError(f"zoomed_views: zoom must lie above 0 and up to 1. Got {zoom!r}")
    count, height, width, _ = images.shape
    random = np.random.default_rng(seed)
    found = np.empty((count * (1 + copies), *images.shape[1:]), images.dtype)
    found[:count] = images
    for i in range(count, len(found)):
        share = random.uniform(zoom, 1)
        rows, columns = (
            random.uniform(0, (1 - share) * (side - 1)) + share * np.arange(side)
            for side in (height, width)
        )
        if flip and random.integers(2):
            columns = columns[::-1]
        view = _between(_between(images[i % count], rows, axis=0), columns, axis=1)
        found[i] = np.rint(view) if np.issubdtype(images.dtype, np.integer) else view
    return found


def _between(image, positions, axis):
    """Values at real positions along an axis, linear between its neighbours."""
    below = np.floor(positions).astype(int)
    above = np.minimum(below + 1, image.shape[axis] - 1)
    share = (positions - below).astype(np.float32)
    share = share.reshape([-1 if i == axis else 1 for i in range(image.ndim)])
    return np.take(image, below, axis) * (1 - share) + np.take(image, above, axis) * share
