"""Grids of images: where 256 pixel values keep 256 codes, and what code 0 stands for there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_lowbit import quantizers
from keras_lowbit.kinds import kind_of, scaling_of
from keras_lowbit.transform.plan import BEFORE_GRID

_IMAGE_RANK = 4


class ImageGrids:
    """Answers about the tensors that `Plan.is_image` names.

    Args:
        plan: the `Plan` of a float model.
        input_range: as `quantize_model` takes it.
    """

    def __init__(self, plan, input_range):
        self.plan = plan
        self.ranges = ranges_by_input(plan.program, input_range)

    def quantizer(self, ref):
        """The grid on which 256 pixel values stay 256 codes, where the range is known."""
        grid = self.grid(ref)
        if grid is None:
            return quantizers.Affine(8)
        scale, lo, offset = grid
        return quantizers.Affine(8, scale=scale, lo=lo, offset=offset)

    def grid(self, ref):
        """`(scale, lowest code, reals of code 0)` of pixels; `None` for an unknown range."""
        call = self.plan.walk_back(ref, BEFORE_GRID)
        ends = self.ranges.get(self.plan.input_of(ref))
        if call is None and ends is None:
            return None
        # Rescalings are of pixels 0..255, unless the range says otherwise.
        gain, shift = (1.0, 0.0) if call is None else self._scaling(call)
        bottom, top = (0.0, 255.0) if ends is None else ends
        scale, offset = gain * (top - bottom) / 255.0, gain * bottom + shift
        lo = int(np.clip(np.rint(offset / scale), -255, 0))
        return scale, lo, offset - scale * lo

    def _scaling(self, call):
        """Gain and shift of the rescalings that end with `call`, one behind the other."""
        scale, offset, last = 1.0, 0.0, call
        while call is not None:
            gain, shift = scaling_of(call)
            if np.ndim(gain) or np.ndim(shift):
                better = self._as_normalization(last) or "Normalization"
                raise ValueError(
                    f"{call.name}: Rescaling by channel cannot become an input grid. "
                    f"Use {better} for that, or one number."
                )
            if not 0 < gain < np.inf or not np.isfinite(shift):
                better = self._as_normalization(last)
                raise ValueError(
                    f"{call.name}: an input must be rescaled by a positive number. Got {gain:g}"
                    f"{f'; use {better} for that' if better else ''}"
                )
            scale, offset = scale * float(gain), offset + scale * float(shift)
            before = self.plan.walk_back(call.inputs[0], BEFORE_GRID)
            if before not in (None, self.plan.walk_back(call.inputs[0], BEFORE_GRID - {"pad"})):
                raise ValueError(
                    f"{call.name}: the zeros that are put around the image would be rescaled too. "
                    "Put all rescalings before the padding"
                )
            call = before
        return scale, offset

    def _as_normalization(self, call):
        """What to write for the rescalings that end with `call`, with its numbers, or `None`.

        gain * x + shift = sign(gain) * (x - mean) / sqrt(variance)
        mean = -shift / gain
        variance = 1 / gain^2
        """
        gain, shift = np.float64(1.0), np.float64(0.0)
        with np.errstate(all="ignore"):  # what is not finite is not offered
            while call is not None:
                factor, term = scaling_of(call)
                gain, shift = gain * factor, shift + gain * term
                call = self.plan.walk_back(call.inputs[0], BEFORE_GRID)
            mean, variance = np.broadcast_arrays(-shift / gain, 1.0 / gain**2)
        signs = set(np.sign(np.atleast_1d(gain)))
        known = np.all(np.isfinite([mean, variance])) and np.all(variance > 0)
        if not known or len(signs) > 1:
            return None
        layer = f"Normalization(mean={_written(mean)}, variance={_written(variance)})"
        return layer if signs == {1.0} else f"{layer} and behind it Rescaling(-1.0)"

    def holds_zero(self, ref):
        """Whether 0.0 is a code of an image's grid, or nearly: half a code beside one."""
        grid = self.grid(ref) if self.plan.is_image(ref) else None
        return grid is None or abs(grid[2]) < 0.501 * grid[0]

    def offset_of(self, ref):
        """Reals that code 0 stands for, where a tensor is an image on its own grid."""
        grid = self.grid(ref) if self.plan.is_image(ref) else None
        if grid is None:
            return 0.0
        padded = self.plan.walk_back(ref, BEFORE_GRID - {"pad"})
        if padded is not None and kind_of(padded) == "pad" and not self.holds_zero(ref):
            return 0.0  # the padding has brought it to another grid
        return grid[2]

    def absorbs(self, layer):
        """Whether a layer's bias can take in the offset of the images that it reads.

        Zeros that SAME padding puts around the codes would stand for the offset. Half a code of
        that is let pass, or 256 pixel values would not keep their codes.
        """
        read = [c.inputs[0] for c in self.plan.program.calls if c.operation is layer]
        kernel = getattr(layer, "kernel_size", (1,))
        pads = max(kernel) > 1 and layer.padding == "same"
        if pads and not all(self.holds_zero(ref) for ref in read):
            return False
        return len({self.offset_of(ref) for ref in read}) == 1


def _written(numbers):
    """Numbers to be copied: one, or a list of one a channel."""
    texts = [f"{x + 0.0:.7g}" for x in np.atleast_1d(numbers)]
    return texts[0] if np.ndim(numbers) == 0 else f"[{', '.join(texts)}]"


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
