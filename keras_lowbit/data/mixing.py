"""Cutout and mixup of a batch, in NumPy."""

from __future__ import annotations

import numpy as np


def cut_out(images: np.ndarray, rows: np.ndarray, columns: np.ndarray, side: int) -> np.ndarray:
    """Set a square of each image to zero; what of it lies outside the image is cut off.

    Args:
        images: `(n, height, width, channels)`; written to.
        rows: `(n,)`, row of the square's centre.
        columns: `(n,)`, its column.
        side: pixels.

    Returns:
        `images`.

    Reference:
        DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout,
        arXiv:1708.04552, section 3.2.
    """
    before, after = side // 2, side - side // 2
    for image, row, column in zip(images, rows, columns, strict=True):
        image[max(0, row - before) : row + after, max(0, column - before) : column + after] = 0
    return images


def mix_up(
    images: np.ndarray, targets: np.ndarray, partners: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each image and its target mixed with those of another.

        image  = share * image  + (1 - share) * image[partner]
        target = share * target + (1 - share) * target[partner]

    Args:
        images: `(n, height, width, channels)`; whole numbers are rounded, half to even, so pixels
            stay pixels.
        targets: `(n, classes)`, probabilities.
        partners: `(n,)`, indices.
        shares: `(n,)`, 0..1.

    Returns:
        New images in their dtype, new targets in float32.

    Reference:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv:1710.09412, eq. 1.
    """
    shares = shares.astype(np.float32)
    of_image, of_target = shares[:, None, None, None], shares[:, None]
    mixed = of_image * images + (1 - of_image) * images[partners]
    if np.issubdtype(images.dtype, np.integer):
        mixed = np.rint(mixed)
    targets = of_target * targets + (1 - of_target) * targets[partners]
    return mixed.astype(images.dtype), targets.astype(np.float32)
