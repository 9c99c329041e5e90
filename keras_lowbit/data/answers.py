"""What outputs of a classifier say."""

from __future__ import annotations

import numpy as np


def top_class(outputs) -> np.ndarray:
    """The class with the largest output, for each image.

    Args:
        outputs: `(images, ..., classes)`.

    Raises:
        ValueError: one output only, which names no class: its threshold is the user's to choose.
    """
    outputs = np.asarray(outputs)
    if outputs.shape[-1] < 2:
        raise ValueError(
            f"Accuracy is counted by the largest of two outputs or more. The model's outputs have "
            f"shape {outputs.shape}: compare them with a threshold of your own"
        )
    return outputs.argmax(-1)
