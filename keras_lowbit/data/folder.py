"""Folders of images by class, read with Pillow.

root/train/cat/1.jpg   root/test/cat/2.jpg      two parts (`TRAIN_NAMES`, `TEST_NAMES`; any case)
root/cat/1.jpg         root/dog/2.jpg           one part, split by a seed
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_lowbit import progress
from keras_lowbit.data.dataset import Dataset, stratified

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one there is
MEMORY_LIMIT = 1 << 30  # bytes of pixels; above it images are read when they are used


def read_folder(
    path: str | Path,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    test_fraction: float = 0.2,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """Read a folder that has one subfolder a class.

    Args:
        path: the folder; with `train/` and `test/` (or `val/`) inside, or with the classes.
        size: pixels, `(height, width)` or one number for both. Images are scaled to cover it
            and cropped at the centre. Without it all images must have one size.
        channels: 3 (RGB) or 1 (grey).
        test_fraction: share of each class that becomes the test part where the folder has none.
        seed: which images those are.
        memory_limit: bytes of pixels; a larger part is read on demand (`LazyImages`).

    Returns:
        uint8 images and their labels; classes are the folder names in sorted order.

    Raises:
        ValueError: no images, an unreadable image, sizes that differ, a class that only one part
            has, parts that cannot be told from classes. The message names the file or folder.
    """
    path = Path(path)
    size = checked_size(size)
    if channels not in (1, 3):
        raise ValueError(f"{path}: channels must be 1 (grey) or 3 (RGB). Got {channels}")
    train_root, test_root = _parts(path)
    classes = tuple(folder.name for folder in _subfolders(train_root))
    files, labels = _listed(train_root, classes, train_root)
    if test_root is None:
        count = max(1, round(test_fraction * len(files)))
        kept, held = stratified(labels, count, seed, str(path))
        parts = [([files[i] for i in part], labels[part]) for part in (kept, held)]
    else:
        parts = [(files, labels), _listed(test_root, classes, train_root)]
    size = _common_size([file for part, _ in parts for file in part], size)
    (x_train, y_train), (x_test, y_test) = (
        (_read(part, size, channels, memory_limit), y) for part, y in parts
    )
    return Dataset(x_train, y_train, x_test, y_test, classes, path.resolve().name)


class LazyImages:
    """Images that are read when they are indexed; looks like a uint8 NHWC array.

    Args:
        files: paths of the images.
        size: pixels, `(height, width)`.
        channels: 3 or 1.
    """

    dtype = np.dtype("uint8")
    ndim = 4

    def __init__(self, files: Sequence[Path], size: tuple[int, int], channels: int):
        self.files = list(files)
        self.size = size
        self.channels = channels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of images, height, width, channels."""
        return (len(self.files), *self.size, self.channels)

    def __len__(self):
        return len(self.files)

    def subset(self, indices: Any) -> LazyImages:
        """The images at `indices` (a slice or an array), still unread."""
        chosen = np.arange(len(self))[indices]
        return LazyImages([self.files[i] for i in chosen], self.size, self.channels)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, (slice, list, np.ndarray)):
            return _stack(self.subset(index).files, self.size, self.channels)
        return read_image(self.files[operator.index(index)], self.size, self.channels)


def read_image(file: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read one image as uint8 `(*size, channels)`, scaled to cover `size` and centre-cropped.

    Raises:
        ValueError: the file is not an image that Pillow can read.
    """
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            image = _upright(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
                grey = np.clip(np.rint(np.asarray(image) / 257), 0, 255)
                image = pillow.fromarray(grey.astype("uint8"))
            if "transparency" in image.info:  # else Pillow warns when it drops the palette's alpha
                image = image.convert("RGBA")
            image = image.convert("RGB" if channels == 3 else "L")
            if (image.height, image.width) != size:
                from PIL import ImageOps

                image = ImageOps.fit(image, size[::-1], pillow.Resampling.BILINEAR)
            return np.asarray(image, "uint8").reshape(*size, channels)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read as an image ({error}). Replace it or take it out of the folder"
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "Folders of images are read with Pillow, which is not installed: "
            "pip install keras-lowbit[images]"
        ) from error
    return Image


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width in pixels; `None` where no size is given.

    Raises:
        ValueError: anything but one or two positive whole numbers.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise ValueError(f"size must be a positive number of pixels or (height, width). Got {size}")
    return pair


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The training folder and the test folder, or the only folder and None."""
    folders = _subfolders(path)
    if not folders:
        raise ValueError(
            f"{path} has no folders in it. Expected one folder of images for each class, "
            "or train/ and test/ with such folders"
        )
    # A class may be called "train"; a part of that name has folders of its own.
    nested = [folder for folder in folders if _subfolders(folder)]
    train = [folder for folder in nested if folder.name.lower() in TRAIN_NAMES]
    tests = [folder for folder in folders if folder.name.lower() in TEST_NAMES]
    tests.sort(key=lambda folder: TEST_NAMES.index(folder.name.lower()))
    same = [folder for folder in tests if folder.name.lower() == tests[0].name.lower()]
    stray = [folder for folder in nested if folder in tests] if not train else []
    if len(train) > 1 or (train and len(same) > 1) or stray:
        listed = ", ".join(folder.name for folder in (*train, *(stray or same)))
        raise ValueError(
            f"{path}: there are folders of classes in {listed}. Expected one train/ and one test/ "
            "with such folders, or the classes alone"
        )
    if train:
        return train[0], tests[0] if tests else None
    if len(nested) == len(folders) and not any(map(_has_images, folders)):
        listed = ", ".join(folder.name for folder in folders[:5])
        raise ValueError(
            f"{path}: {listed} hold folders, no images. If they are parts, name them train/ and "
            "test/; classes need an image beside their folders"
        )
    return path, None


def _has_images(folder: Path) -> bool:
    return any(_is_image(file) for file in folder.iterdir())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _listed(root: Path, classes: tuple[str, ...], trained: Path) -> tuple[list[Path], np.ndarray]:
    """Image files below `root` and their labels; classes are those of the folder `trained`."""
    unknown = [folder.name for folder in _subfolders(root) if folder.name not in classes]
    if unknown:
        raise ValueError(
            f"{root} has classes that the training part lacks: {', '.join(unknown)}. "
            f"Known: {', '.join(classes)}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            raise ValueError(
                f"{root} lacks the class {name}, which the training part has. Add a folder of its "
                f"images, or remove {trained / name}"
            )
        found = sorted(file for file in (root / name).rglob("*") if _is_image(file))
        if not found:
            raise ValueError(
                f"{root / name} has no images in it. Looked for {', '.join(SUFFIXES)}; "
                "remove the folder or fill it"
            )
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, "int32")


def _common_size(files: list[Path], size: tuple[int, int] | None) -> tuple[int, int]:
    """The given size, or the one that every file has (only headers are read)."""
    if size is not None:
        return size
    common = _header_size(files[0])
    for file in progress.track(files, "checking image sizes"):
        found = _header_size(file)
        if found != common:
            raise ValueError(
                f"{file} has {found[0]}x{found[1]} pixels (height x width), {files[0]} has "
                f"{common[0]}x{common[1]}. Pass size=(height, width), or in a "
                "recipe [data] size, to scale and crop them"
            )
    return common


def _header_size(file: Path) -> tuple[int, int]:
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations with a quarter turn
            return image.size if turned else image.size[::-1]
    except Exception as error:
        raise _unreadable(file, error) from error


def _read(files: list[Path], size: tuple[int, int], channels: int, memory_limit: int) -> Any:
    if len(files) * size[0] * size[1] * channels > memory_limit:
        return LazyImages(files, size, channels)
    return _stack(files, size, channels, lambda files: progress.track(files, "reading images"))


def _stack(
    files: Sequence[Path],
    size: tuple[int, int],
    channels: int,
    shown: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> np.ndarray:
    images = np.empty((len(files), *size, channels), "uint8")
    for image, file in zip(images, shown(files), strict=True):
        image[...] = read_image(file, size, channels)
    return images
