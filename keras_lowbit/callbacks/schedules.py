"""The check and the ramps that callbacks share."""

from __future__ import annotations

import math

import keras


def check_switch(callback: keras.callbacks.Callback, what: str) -> None:
    """`ValueError` if `callback.switch_epoch` lies past the end of the `fit` that begins.

    Args:
        callback: with its `params` set.
        what: what begins at that epoch.
    """
    epochs = callback.params.get("epochs")
    if epochs is not None and callback.switch_epoch >= epochs:
        raise ValueError(
            f"{type(callback).__name__}: {what} begins at epoch {callback.switch_epoch}, which "
            f"never comes: fit runs epochs 0 to {epochs - 1}. Switch earlier or train longer"
        )


def cooled(first: float, last: float, epoch: int, epochs: int) -> float:
    """A temperature along a half cosine, from `first` in epoch 0 to `last` in the last one."""
    passed = epoch / (epochs - 1) if epochs > 1 else 1.0
    return first + (last - first) * half_cosine(passed)


def half_cosine(share: float) -> float:
    """A ramp without corners: 0 at the share 0 of a schedule and before, 1 at 1 and after."""
    return 0.5 * (1.0 - math.cos(math.pi * min(max(share, 0.0), 1.0)))
