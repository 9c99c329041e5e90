"""`input_range` of `quantize_model`, as what it says of each input."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_IMAGE_RANK = 4


def ranges_by_input(program, given) -> dict[str, tuple[float, float]]:
    """Reals of pixel 0 and pixel 255 by input name, for inputs whose range is known.

    Args:
        program: of `walk.flatten`.
        given: `None`, a pair for all images (or for the only input), or pairs by input name.

    Raises:
        ValueError: an unknown name, or what is no rising pair of numbers.
    """
    if given is None:
        return {}
    names = program.input_names
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"input_range names {unknown}. The model's inputs: {list(names)}")
        return {name: _pair(ends) for name, ends in given.items() if ends is not None}
    ends = _pair(given)
    images = [n for n, r in zip(names, program.inputs, strict=True) if len(r.shape) == _IMAGE_RANK]
    return dict.fromkeys(names if len(names) == 1 else images, ends)


def _pair(given):
    try:
        bottom, top = given
        by_channel = np.ndim(bottom) or np.ndim(top)
        ends = None if by_channel else (float(bottom), float(top))
    except (TypeError, ValueError):
        ends = None
    if ends is None or not np.all(np.isfinite(ends)):
        raise ValueError(
            "input_range must be a pair of numbers, or pairs by input name. For a range by channel "
            f"put a Normalization layer behind the input. Got {given!r}"
        )
    if not ends[1] > ends[0]:
        raise ValueError(f"input_range must rise. Got {given}")
    return ends
