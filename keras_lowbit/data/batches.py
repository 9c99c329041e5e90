"""Batches for `fit` and `evaluate` on any backend, cheap enough for a CPU."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.data.mixing import cut_out, mix_up


class Batches(keras.utils.PyDataset):
    """Images in order, in batches; also for images that are read on demand.

    Args:
        x: images `(n, height, width, channels)`: an array or `LazyImages`.
        y: labels `(n,)`, or probabilities `(n, classes)`.
        batch_size: images a batch; the last batch may be smaller.

    Raises:
        ValueError: no images, lengths that differ, or a batch size below 1.
    """

    def __init__(self, x: Any, y: Any, batch_size: int = 128):
        super().__init__()
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(
                f"{type(self).__name__}: x and y must have one common length above 0. "
                f"Got {len(x)} and {len(y)}"
            )
        self.batch_size = checked_count(
            batch_size, who=f"{type(self).__name__}: batch_size", least=1
        )
        self.x, self.y = x, np.asarray(y)

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.x[chosen], self.y[chosen]


class AugmentedBatches(Batches):
    """Shuffled batches of randomly shifted and mirrored images, cut and mixed if asked for.

    A batch depends on `(seed, epoch, position in the epoch)` only, so a run that resumes sees the
    batches that it would have seen, in the same order. `epoch` counts up by itself after each
    pass. Where it must be exact, in a run that resumes (`initial_epoch=`, `BackupAndRestore`), let
    it follow `fit`:

        batches = AugmentedBatches(x, y, 128)
        model.fit(batches, epochs=20, callbacks=[batches.follow_epochs(), ...])

    Leave `steps_per_epoch` of `fit` unset: an epoch is one pass.

    Args:
        x: images `(n, height, width, channels)`: an array or `LazyImages`.
        y: labels `(n,)`, or probabilities `(n, classes)`, which `mixup` needs.
        batch_size: images a batch.
        seed: start of all randomness.
        flip: whether half of the images are mirrored left and right.
        pad: pixels; the largest shift. Zeros move in at the borders.
        drop_remainder: leave the last, smaller batch out, so that a compiled step meets one
            shape only.
        cutout: pixels; side of a square that is set to zero at a random place, 0 for none.
        mixup: both parameters of the beta distribution of an image's share in its mixture with
            another of the batch, 0 for no mixing.

    Raises:
        ValueError: as `Batches`; `pad`, `cutout` or `mixup` is negative; `drop_remainder` leaves no
            batch; `mixup` with labels instead of probabilities.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        batch_size: int = 128,
        seed: int = 0,
        flip: bool = True,
        pad: int = 4,
        drop_remainder: bool = False,
        cutout: int = 0,
        mixup: float = 0.0,
    ):
        super().__init__(x, y, batch_size)
        self.pad = checked_count(pad, who="AugmentedBatches: pad, in pixels,", least=0)
        self.cutout = checked_count(cutout, who="AugmentedBatches: cutout, in pixels,", least=0)
        checked_number(mixup, who="AugmentedBatches: mixup", least=0)
        if mixup and self.y.ndim != 2:
            raise ValueError(
                "AugmentedBatches: mixup mixes probabilities (n, classes); "
                f"got labels {self.y.shape}. keras.utils.to_categorical makes them"
            )
        if drop_remainder and len(x) < batch_size:
            raise ValueError(
                f"AugmentedBatches: {len(x)} images make no batch of {batch_size}. "
                "Take a smaller batch_size or drop_remainder=False"
            )
        self.seed, self.flip, self.mixup = seed, flip, mixup
        self.drop_remainder = drop_remainder
        self.epoch = 0
        self._order = (-1, np.empty(0, int))
        self._positions: dict[int, int] | None = None

    def __len__(self):
        return len(self.x) // self.batch_size if self.drop_remainder else super().__len__()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        if self._positions is not None:
            index = self._positions.setdefault(index, len(self._positions))
        return self.batch_at(index)

    def batch_at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch at a place of this epoch, whatever a pass has asked for."""
        epoch = self.epoch
        chosen = self._permutation(epoch)[position * self.batch_size :][: self.batch_size]
        rng = np.random.default_rng((self.seed, epoch, position))
        top, left = rng.integers(0, 2 * self.pad + 1, (2, len(chosen)))
        flipped = rng.integers(0, 2, len(chosen)) == 1
        if not self.flip:
            flipped[:] = False
        images = crop_flip_numpy(self.x[chosen], top, left, flipped, self.pad)
        targets = self.y[chosen]
        if self.cutout:
            rows, columns = (rng.integers(0, size, len(chosen)) for size in images.shape[1:3])
            images = cut_out(images, rows, columns, self.cutout)
        if self.mixup:
            shares = rng.beta(self.mixup, self.mixup, len(chosen))
            images, targets = mix_up(images, targets, rng.permutation(len(chosen)), shares)
        return images, targets

    def _permutation(self, epoch: int) -> np.ndarray:
        # Read and replaced as one value: Keras fetches batches from a thread of its own.
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
            self._order = (epoch, order)
        return order

    def on_epoch_begin(self):
        """Keras calls this before each pass."""
        # `fit` shuffles the indices with Python's global random, which no checkpoint holds. So
        # within a pass the n-th index it asks for gets the n-th batch, whatever the index is.
        self._positions = {}

    def on_epoch_end(self):
        """Keras calls this after each pass, and once more when it peeks to build a model."""
        self._positions = None
        self.epoch += 1

    def follow_epochs(self) -> keras.callbacks.Callback:
        """A callback that sets `epoch` to the number `fit` is at."""
        return keras.callbacks.LambdaCallback(on_epoch_begin=self._set_epoch)

    def _set_epoch(self, epoch: int, logs: Any = None):
        self.epoch = epoch


def crop_flip_numpy(
    images: np.ndarray, top: np.ndarray, left: np.ndarray, flipped: np.ndarray, pad: int
) -> np.ndarray:
    """`keras_lowbit.data.augment.crop_flip` in NumPy, with slices: a few microseconds an image."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.empty_like(images)
    for i in range(len(images)):
        crop = padded[i, top[i] : top[i] + height, left[i] : left[i] + width]
        out[i] = crop[:, ::-1] if flipped[i] else crop
    return out
