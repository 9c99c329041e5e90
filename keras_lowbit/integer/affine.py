"""Rules for calls that scale and shift: what each becomes in integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keras_lowbit.integer.emit import identity
from keras_lowbit.integer.values import Image, Linear, NotExportable, OnGrid
from keras_lowbit.kinds import batch_norm_of, normalizing_of, scaling_of


def batch_norm(lowering, call):
    """A gain and a shift a channel, from the moving statistics."""
    layer = call.operation
    value = lowering.read(call)
    if layer.axis not in (-1, len(call.output.shape) - 1):
        raise NotExportable(
            f"{call.name}: batch norm must run over the last axis. Got axis={layer.axis}; build it "
            "with axis=-1, for images with their channels last"
        )
    return affine(value, *batch_norm_of(layer), call)


def normalization(lowering, call):
    """Likewise, from statistics that were adapted before."""
    known = normalizing_of(call.operation)
    if known is None:
        raise NotExportable(
            f"{call.name}: only one mean and variance, or one a channel, can be exported. "
            f"Got axis={call.operation.axis}"
        )
    return affine(lowering.read(call), *known, call)


def affine(value, gain, shift, call):
    """`gain * value + shift`, numbers or one a channel, in the operation before or in a copy."""
    limit = getattr(value, "relu", None)
    if limit is not None and np.ndim(gain) == 0 and gain > 0 and not np.any(shift):
        # A positive factor may as well come before the clip.
        return replace(affine(replace(value, relu=None), gain, shift, call), relu=limit * gain)
    channels = (value.shape[-1],)
    gain, shift = (np.broadcast_to(np.asarray(x, np.float64), channels) for x in (gain, shift))
    if isinstance(value, OnGrid) and value.relu is None:
        return identity(value, call.name).affine(gain, shift)
    if isinstance(value, Linear) and value.relu is None:
        return value.affine(gain, shift)
    raise NotExportable(
        f"{call.name}: what scales and shifts must follow a quantized layer or a tensor on a grid; "
        "put a Quantize and a Dequantize layer before it"
    )


def rescaling(lowering, call):
    """Of pixels, what the file's own input quantization says; else a gain and a shift."""
    value = lowering.read(call)
    gain, shift = scaling_of(call)
    if not isinstance(value, Image):
        return affine(value, gain, shift, call)
    if np.ndim(gain) or np.ndim(shift):
        raise NotExportable(f"{call.name}: an input can be rescaled by one number only")
    gain, shift = float(gain), float(shift)
    return replace(value, scale=value.scale * gain, offset=value.offset * gain + shift)
