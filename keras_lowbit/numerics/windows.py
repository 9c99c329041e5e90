"""Where windows of convolutions and pools lie: SAME padding."""

from __future__ import annotations


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
