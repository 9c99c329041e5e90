"""What a data set is, whatever it was read from, and how one is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# A larger class index is an identifier that nobody numbered, and would name as many classes.
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images for training and for the final test.

    Images come out as uint8 (raw pixels 0..255) or float32, NHWC; labels as int32 class
    indices. A missing channel axis is added; float16 and float64 become float32; other integers
    must lie in 0..255 and become uint8.

    Args:
        x_train: images `(n, height, width, channels)` or `(n, height, width)`; an array, or
            images read on demand (`keras_lowbit.data.folder.LazyImages`).
        y_train: class indices `(n,)` or `(n, 1)`.
        x_test: images of the same size and kind.
        y_test: class indices; every class must also occur in `y_train`'s range.
        classes: name of each class; numbers when left out.
        name: what errors and reports call the data.

    Raises:
        ValueError: an array has the wrong shape or type, is empty, contains NaN or infinity, or
            a label is out of range. The message names the data set and the array.
    """

    x_train: Any
    y_train: np.ndarray
    x_test: Any
    y_test: np.ndarray
    classes: tuple[str, ...] = ()
    name: str = "data"

    def __post_init__(self):
        for part in ("train", "test"):
            x = _images(getattr(self, f"x_{part}"), f"{self.name}: x_{part}")
            y = _labels(getattr(self, f"y_{part}"), f"{self.name}: y_{part}")
            if len(x) != len(y):
                raise ValueError(
                    f"{self.name}: x_{part} and y_{part} must have equal lengths. "
                    f"Got {len(x)} images and {len(y)} labels"
                )
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", y)
        self._check_parts_agree()

    def _check_parts_agree(self):
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"{self.name}: training and test images must have the same shape. "
                f"Got {self.x_train.shape[1:]} and {self.x_test.shape[1:]}"
            )
        if self.x_train.dtype != self.x_test.dtype:
            raise ValueError(
                f"{self.name}: training and test images must have the same type. "
                f"Got {self.x_train.dtype} and {self.x_test.dtype}"
            )
        count = len(self.classes) or int(self.y_train.max()) + 1
        for part in ("train", "test"):
            highest = int(getattr(self, f"y_{part}").max())
            if highest >= count:
                raise ValueError(
                    f"{self.name}: y_{part} must lie in 0..{count - 1} ({count} classes). "
                    f"Got {highest}"
                )
        names = tuple(str(c) for c in self.classes) or tuple(str(c) for c in range(count))
        object.__setattr__(self, "classes", names)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image, in pixels."""
        return tuple(int(size) for size in self.x_train.shape[1:])

    def __str__(self):
        return (
            f"{self.name}: {len(self.x_train)} training and {len(self.x_test)} test images "
            f"{'x'.join(map(str, self.image_shape))} {self.x_train.dtype}, "
            f"{self.num_classes} classes"
        )

    __repr__ = __str__


def holdout(dataset: Dataset, n: int = 5000, seed: int = 0) -> Dataset:
    """Set `n` training images aside, to make choices on.

    The images depend on the labels, `n` and `seed` only, and every class keeps its share.

    Args:
        dataset: what to split; its test images take no part.
        n: number of images to hold out.
        seed: which images.

    Returns:
        A data set whose `x_test, y_test` are the held-out images and whose `x_train, y_train`
        are the other training images. Choose on it, then measure once on `dataset.x_test`.

    Raises:
        ValueError: `n` leaves no image on one side.
    """
    kept, held = stratified(dataset.y_train, n, seed, dataset.name)
    return Dataset(
        take(dataset.x_train, kept),
        dataset.y_train[kept],
        take(dataset.x_train, held),
        dataset.y_train[held],
        dataset.classes,
        f"{dataset.name} (held out {n})",
    )


def stratified(labels: np.ndarray, n: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Split indices in two so that every class keeps its share.

    A class with `m` of `t` labels gives `n * m / t` of them, rounded by largest remainder, and
    keeps one at least.

    Args:
        labels: class indices `(t,)`.
        n: size of the second part, 1..t-1.
        seed: which ones.
        name: whose labels they are, for the error.

    Returns:
        `(rest, picked)`, both sorted.

    Raises:
        ValueError: `n` is out of range, or leaves a class without an image in the rest.
    """
    if not 0 < n < len(labels):
        raise ValueError(
            f"{name}: the part to split off must hold 1..{len(labels) - 1} of the "
            f"{len(labels)} images. Got {n}"
        )
    classes, counts = np.unique(labels, return_counts=True)
    share = n * counts / len(labels)
    quota = np.floor(share).astype(int)
    extra = np.argsort(-(share - quota), kind="stable")[: n - quota.sum()]
    quota[extra] += 1
    if np.any(quota >= counts):
        emptied = classes[quota >= counts].tolist()
        raise ValueError(
            f"{name}: splitting off {n} of {len(labels)} images leaves no training image of class "
            f"{', '.join(map(str, emptied[:5]))}. Split off fewer, or add images"
        )
    # RandomState's streams are frozen for good; those of a Generator may change with NumPy.
    rng = np.random.RandomState(seed)
    picked = [
        rng.permutation(np.flatnonzero(labels == c))[:q]
        for c, q in zip(classes, quota, strict=True)
    ]
    picked = np.sort(np.concatenate(picked))
    return np.setdiff1d(np.arange(len(labels)), picked), picked


def take(images: Any, indices: np.ndarray) -> Any:
    """Some of the images; lazily read ones stay lazy."""
    return images.subset(indices) if hasattr(images, "subset") else images[indices]


def _images(x: Any, what: str) -> Any:
    if hasattr(x, "subset"):
        return x
    x = np.asarray(x)
    if x.ndim == 3:
        x = x[..., np.newaxis]
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"{what} must hold images (n, height, width) or (n, height, width, channels). "
            f"Got shape {x.shape}"
        )
    if x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise ValueError(
            f"{what} has its channels first, shape {x.shape}. Channels come last here: "
            "x.transpose(0, 2, 3, 1)"
        )
    if x.dtype.kind not in "iuf":
        raise ValueError(f"{what} must be integers 0..255 or floats. Got type {x.dtype}")
    # min and max pass NaN and infinity on, without a mask as large as the images.
    low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{what} contains NaN or infinite values")
    if x.dtype.kind == "f":
        return x.astype("float32", copy=False)
    if low < 0 or high > 255:
        raise ValueError(
            f"{what} holds integers in {low:.0f}..{high:.0f}. Pixels are 0..255; pass other "
            "values as float32"
        )
    return x.astype("uint8", copy=False)


def _labels(y: Any, what: str) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2:
        raise ValueError(
            f"{what} must hold one class index an image. Got shape {y.shape}; "
            "for one-hot labels pass y.argmax(-1)"
        )
    if y.ndim != 1 or y.size == 0:
        raise ValueError(f"{what} must have shape (n,). Got {y.shape}")
    if y.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integer class indices. Got type {y.dtype}")
    if y.min() < 0:
        raise ValueError(f"{what} must not be negative. Got {y.min()}")
    if y.max() >= _MOST_CLASSES:
        raise ValueError(
            f"{what} holds the class index {y.max()}. Classes are numbered from 0, without gaps: "
            "np.unique(y, return_inverse=True)[1] numbers them"
        )
    return y.astype("int32", copy=False)
