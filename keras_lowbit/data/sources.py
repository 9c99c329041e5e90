"""`load`: one call for data that comes by name, as a `.npz` file or as a folder of images."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

from keras_lowbit.checks import did_you_mean
from keras_lowbit.data.dataset import Dataset, stratified
from keras_lowbit.data.folder import checked_size, read_folder
from keras_lowbit.data.npz import read_npz
from keras_lowbit.paths import expanded

DOWNLOADED: dict[str, tuple[str, ...]] = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": (),
    "fashion_mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "mnist": tuple("0123456789"),
}
NAMES = ("digits", *DOWNLOADED)
DIGITS_TEST = 360  # of 1,797 images: a fifth


def load(
    source: str | Path,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    seed: int = 0,
) -> Dataset:
    """Load a data set by name or path.

    Args:
        source: `"digits"` (scikit-learn's, 8x8 grey, no download), a `keras.datasets` name
            (`"cifar10"`, `"cifar100"`, `"mnist"`, `"fashion_mnist"`), a `.npz` file or a folder
            of images by class. A name wins over a path; write `./digits` for a folder.
        size: pixels, as `keras_lowbit.data.folder.read_folder` takes them: images of folders are
            made so, others must be so.
        channels: 3 or 1, of images of folders; those of others must be grey for 1.
        seed: which images of a folder without `test/` become the test part.

    Returns:
        A `Dataset` with arrays, uint8 or float32, channels last.

    Raises:
        ValueError: the name or path is unknown, a download failed, a file is damaged, images
            have another size, an optional dependency is missing. The message says what to do.
    """
    if is_folder(source):
        return read_folder(expanded(source), size, channels, seed=seed)
    dataset = _as_it_is(source)
    _check_asked(dataset, checked_size(size), channels)
    return dataset


def is_folder(source: str | Path) -> bool:
    """Whether `load` reads a folder of images; the others have images of a size of their own.

    Raises:
        ValueError: a path below a home folder that nobody has.
    """
    return str(source) not in NAMES and expanded(source).is_dir()


def _as_it_is(source):
    """A data set by name, or of a file."""
    name = str(source)
    if name == "digits":
        return _digits()
    if name in DOWNLOADED:
        return _downloaded(name)
    path = expanded(source)
    if path.is_file() and path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.is_file():
        raise ValueError(f"{path} is neither a .npz file nor a folder of images")
    hint = did_you_mean(name, NAMES)
    raise ValueError(
        f"No data set and no path is called {name!r}.{hint} Known names: {', '.join(NAMES)}; "
        "or pass a .npz file or a folder of images by class"
    )


def _check_asked(dataset, size, channels):
    height, width, depth = dataset.image_shape
    if size not in (None, (height, width)):
        raise ValueError(
            f"{dataset.name} has images of {height}x{width} pixels, and size is "
            f"{size[0]}x{size[1]}: only those of folders are scaled. Leave size out"
        )
    # Three channels are the default, and nobody need have asked for them.
    if channels not in (3, depth):
        raise ValueError(
            f"{dataset.name} has images of {depth} channels, and channels is {channels}: only "
            "those of folders are converted. Leave channels out"
        )


def _digits() -> Dataset:
    """1,797 handwritten digits, 16 grey levels stretched to 0..255, split by a fixed seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "The digits come with scikit-learn, which is not installed: "
            "pip install keras-lowbit[digits]"
        ) from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype("uint8")
    train, test = stratified(bunch.target, DIGITS_TEST, 0, "digits")
    return Dataset(
        images[train],
        bunch.target[train],
        images[test],
        bunch.target[test],
        tuple("0123456789"),
        "digits",
    )


def _downloaded(name: str) -> Dataset:
    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise ValueError(
            f"{name} could not be downloaded ({error}). Without a network pass a file instead: "
            f"{name}.npz with x_train, y_train, x_test, y_test"
        ) from error
    return Dataset(x_train, y_train, x_test, y_test, DOWNLOADED[name], name)
