"""Scales of sums and copies that do not put values between two codes.

A sum of `k` steps of one grid and `l` of another lies half-way between two codes of its own grid
again and again where the three scales are in a simple ratio, as those of `x` and of its max pool
are after `calibrate`. Keras rounds such a tie to the even code, files round it up.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.integer.values import NotExportable

# Scales move by so many times this share of themselves: far more than float32 adds to a tie of 256
# codes (3e-5 of a code), far less than calibration knows.
_SHARE = 2.0**-12
_TRIES = 8
_ROUNDS = 4
# As near to the middle, in codes, as a tie may look in float32.
_NEAR = 3e-5
_MOST = 1e-3  # share that may lie so near; by chance it is 6e-5. Of multiples of one scale: none
_STEPS = np.arange(-255.0, 256.0)


def leave_ties(model, quantizers) -> None:
    """Make scales a little smaller where sums or copies on their grids would often be ties.

    Args:
        model: a calibrated model of `quantize_model`. One that cannot be exported stays as it is.
        quantizers: those whose scales may move; of activations, one scale a tensor.
    """
    program = walk.flatten(model)
    # `len`: shapes are always true on TensorFlow.
    single = [q for q in quantizers if isinstance(q.scale, keras.Variable)]
    free = {id(q) for q in single if len(q.scale.shape) == 0}
    for _ in range(_ROUNDS):  # a scale that moves is in the ratios of what reads its tensor
        try:
            lowering = Lowering(program, 1, "int8")
            lowering.run()
        except NotExportable:
            return
        moved = False
        for op in lowering.emitter.ops:
            quantizer = lowering.grids.get(op.output)
            ratios = _ratios(op, lowering.emitter.tensors) if id(quantizer) in free else None
            if ratios is None or not ties(ratios):
                continue
            shares = (1.0 - n * _SHARE for n in range(1, _TRIES + 1))
            share = next((s for s in shares if not ties(ratios / s)), None)
            if share is not None:
                scale = ops.convert_to_numpy(quantizer.scale)
                quantizer.scale.assign(scale * np.float32(share))
                moved = True
        if not moved:
            return


def _ratios(op, tensors):
    """Scales of what a sum or a copy reads, in steps of its own; `None` for other operations."""
    made = tensors[op.output].scale
    if isinstance(op, ir.Add):
        return np.array([tensors[name].scale / made for name in op.inputs])
    if isinstance(op, ir.DepthwiseConv2D) and op.kernel.shape[:2] == (1, 1):
        gains = (
            op.kernel.astype(np.float64) * op.kernel_scale.reshape(op.kernel.shape[-2:])
        ).ravel()
        if not op.bias.any() and np.ptp(gains) <= 1e-6 * np.abs(gains).max():
            return np.array([tensors[op.inputs[0]].scale * gains[0] / made])
    return None


def ties(ratios) -> bool:
    """Whether whole multiples of `ratios` lie between codes, or many of their sums do.

    Args:
        ratios: one or two, scales of what is added in steps of the sum.
    """
    multiples = [_STEPS * ratio for ratio in ratios]  # beside 0, which is the commonest of all
    if len(ratios) > 1:
        multiples.append(multiples[0][:, None] + multiples[1])
    return any(_share_between(reals[np.abs(reals) < 256.0]) > _MOST for reals in multiples)


def _share_between(reals):
    return (np.abs(np.abs(reals - np.rint(reals)) - 0.5) < _NEAR).mean()
