"""Where windows of convolutions and pools lie."""

from __future__ import annotations

import numpy as np


def same_padding(size: int | None, window: int, stride: int) -> tuple[int, int]:
    """How many places SAME adds before and after one axis; the odd one comes after.

        places = ceil(size / stride)          added = max((places - 1) stride + window - size, 0)

    Args:
        size: length of the axis; at stride 1 it does not matter and may be `None`.
        window: extent of the kernel, dilation included.
        stride: step of the window.
    """
    total = window - 1 if stride == 1 else max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def reaches_over(size: int, window: int, stride: int) -> bool:
    """Whether some window of SAME covers a place outside one axis."""
    return any(same_padding(size, window, stride))


def positions_seen(size: int, window: int, stride: int, padding: str) -> np.ndarray:
    """How many positions of one axis each window of a pool covers, padding left out.

    Args:
        size: length of the axis.
        window: extent of the pool.
        stride: step of the window.
        padding: `"SAME"` or `"VALID"`.
    """
    places = -(-size // stride) if padding == "SAME" else (size - window) // stride + 1
    before = same_padding(size, window, stride)[0] if padding == "SAME" else 0
    start = np.arange(places) * stride - before
    return np.minimum(start + window, size) - np.maximum(start, 0)
