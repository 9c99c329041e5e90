"""Biases that an exported file can hold: what is left between Keras and the file is float noise.

A file's biases are whole numbers of units, `scale_in * scale_kernel[c] * |gain[c]|`. Left alone, a
Keras model of 8-bit kernels differs from its file by half a unit at most; that moves one code in
some thousands of the first layers, and the layers behind them make it one code in three.

Likewise a weight on the border between two codes: `latent / scale` is rounded differently by
different compilers, one code of a kernel moves a whole channel, and a network of 4 bits then gives
other answers for a fifth of all images.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.integer.values import NotExportable
from keras_lowbit.kinds import activation_name, batch_norm_of, kind_of, scaling_of
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.numerics.arrays import float64_of

# Share of a code: float32 knows a ratio of 128 codes to 1e-5.
_BORDER = 1e-4
# What may stand between a product and the grid that it is put on.
_MELTS = ("batch_norm", "dropout", "rescaling", "activation")


def snap_biases(model: keras.Model) -> keras.Model:
    """Move biases to the nearest whole number of units, in place.

        unit[c] = scale_in * scale_kernel[c] * |gain[c]|           gain: of what scales behind
        bias'[c] = round(bias[c] / unit[c]) * unit[c]              half to even

    where `bias` is what is added in all; the layer's own bias moves, or the `beta` of the last
    batch norm behind it; likewise the `beta` of a batch norm that has no product in front. The
    exported file stays as it is, because it rounds biases to the same units; with
    `weights="int4_all"` it rounds to others. `calibrate` and `correct_biases` end with
    this; call it once more after `fit`, before the Keras model is measured against its file.

    Latent weights within 1e-4 of a code of the border between two codes move that far away from
    it; no code changes.

    Args:
        model: a calibrated model of `quantize_model`. One that cannot be exported comes back as
            it is, and so do biases of layers called on several grids.

    Returns:
        The model.
    """
    program = walk.flatten(model)
    try:
        lowering = Lowering(program, 1, "int8")
        lowering.run()
    except NotExportable:
        return model
    readers = program.readers()
    for call in program.calls:
        found = lowering.emitter.biases.get(call.name, [])
        # A batch norm behind a sum, a pool or an image becomes a product of its own.
        shift = _shift(found) if kind_of(call) in ("product", "batch_norm") else None
        if shift is None:
            continue
        variable, gain = _variable(call, readers)
        if variable is not None:
            moved = float64_of(variable) + np.divide(shift, gain, where=gain != 0, out=0 * gain)
            variable.assign(moved.astype(np.float32))
    for layer in {id(call.operation): call.operation for call in program.calls}.values():
        for kernel in kernels(layer):
            if getattr(kernel.quantizer, "scale", None) is not None:
                _leave_borders(kernel)
    return model


def _leave_borders(kernel):
    """Move latents away from the border between two codes; codes stay as they are."""
    codes, scale = kernel.codes()
    latent = float64_of(kernel.latent)
    beside = latent / scale - codes
    near = np.abs(np.abs(beside) - 0.5) < _BORDER
    if not near.any():
        return
    moved = (codes + np.sign(beside) * (0.5 - _BORDER)) * scale.astype(np.float64)
    kernel.latent.assign(np.where(near, moved, latent).astype(np.float32))
    again, same = kernel.codes()
    if not np.array_equal(codes, again) or not np.array_equal(scale, same):
        # Not codes of `latent / scale`: learned levels, for one.
        kernel.latent.assign(latent.astype(np.float32))


def _shift(found):
    """What to add to a product's bias, by channel; `None` where its calls differ or need nothing.

    Where a bias has no nearest code (it would not fit, or its channel saturates) nothing moves.
    """
    shifts = []
    for biases in found:
        shift = biases.codes * biases.unit - biases.reals
        # 0.5, and what float32 scales add to it.
        shifts.append(np.where(np.abs(shift) <= 0.501 * biases.unit, shift, 0.0))
    shifts = [shift for shift in shifts if shift.any()]
    if not shifts or any(not np.array_equal(shift, shifts[0]) for shift in shifts):
        return None
    return shifts[0]


def _variable(call, readers):
    """The last variable that is added behind a product, and what it is multiplied by afterwards."""
    chain = [call]
    while True:
        behind = readers.get(chain[-1].output.index, [])
        if len(behind) != 1 or kind_of(behind[0]) not in _MELTS:
            break
        chain.append(behind[0])
    if any(kind_of(reader) == "batch_norm" for reader in behind):
        return None, None  # two batch norms read one tensor: two biases, one variable
    gain = np.ones(())
    for link in reversed(chain):
        layer = link.operation
        if kind_of(link) in ("activation", "product") and activation_name(layer) == "hard_sigmoid":
            gain = gain / 6.0
        if kind_of(link) == "rescaling":
            gain = gain * scaling_of(link)[0]
        elif kind_of(link) == "batch_norm":
            if layer.center:
                return layer.beta, gain + np.zeros(layer.beta.shape)
            gain = gain * batch_norm_of(layer)[0]
        elif kind_of(link) == "product" and layer.use_bias:
            return layer.bias, gain + np.zeros(layer.bias.shape)
    return None, None
