"""Random crops and flips inside a compiled graph, on any backend."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lowbit.checks import checked_count


def crop_flip(images: Any, top: Any, left: Any, flipped: Any, pad: int) -> Any:
    """Pad with zeros, crop each image to its old size at its own place, mirror some.

        out[i, r, c] = padded[i, top[i] + r, left[i] + (width - 1 - c if flipped[i] else c)]

    Args:
        images: `(n, height, width, channels)`, any type; height, width and channels static.
        top: int32 `(n,)`, 0..2*pad.
        left: int32 `(n,)`, 0..2*pad.
        flipped: bool `(n,)`.
        pad: pixels added on every side.

    Returns:
        Images of the shape and type of `images`.
    """
    height, width, channels = images.shape[1:]
    padded = ops.pad(images, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
    across = ops.arange(width, dtype="int32")[None, :]
    columns = left[:, None] + ops.where(flipped[:, None], width - 1 - across, across)
    rows = top[:, None] + ops.arange(height, dtype="int32")[None, :]
    number = ops.arange(ops.shape(images)[0], dtype="int32")
    # One gather of whole pixels: the same for eager, compiled and dynamic batches.
    lines = number[:, None] * (height + 2 * pad) + rows
    index = lines[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    return ops.take(ops.reshape(padded, (-1, channels)), index, axis=0)


@keras.saving.register_keras_serializable(package="keras_lowbit")
class RandomCropFlip(keras.layers.Layer):
    """Shift each image by up to `pad` pixels and mirror half of them, in training only.

    The random state is saved with the weights, so training that resumes from a checkpoint goes
    on with the crops it would have seen. In inference the layer does nothing.

    Args:
        pad: pixels; zeros move in at the borders.
        flip: whether to mirror left and right.
        seed: start of the random stream.

    Raises:
        ValueError: `pad` is negative.
    """

    def __init__(self, pad: int = 4, flip: bool = True, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.pad = checked_count(pad, who="RandomCropFlip: pad, in pixels,", least=0)
        self.flip = flip
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        """Nothing to build: the layer has no weights."""
        self.built = True

    def call(self, inputs, training=False):
        """Crop and flip when `training`, else return `inputs`."""
        if not training:
            return inputs
        n = ops.shape(inputs)[0]
        top, left = (self._whole(n, 2 * self.pad + 1) for _ in range(2))
        flipped = self._whole(n, 2) == 1 if self.flip else ops.zeros((n,), "bool")
        return crop_flip(inputs, top, left, flipped, self.pad)

    def _whole(self, n, bound):
        return keras.random.randint((n,), 0, bound, dtype="int32", seed=self.seed_generator)

    def compute_output_shape(self, input_shape):
        """The shape does not change."""
        return input_shape

    def save_own_variables(self, store):
        """Keras leaves seeds out of checkpoints; a resumed run needs this one."""
        super().save_own_variables(store)
        store["seed_state"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store):
        """Take the random state up again."""
        self.seed_generator.state.assign(store["seed_state"])

    def get_config(self):
        """Arguments of the constructor."""
        return {**super().get_config(), "pad": self.pad, "flip": self.flip, "seed": self.seed}
