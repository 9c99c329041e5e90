"""The rows of a summary: what one call of a model holds and computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.analysis.floats import why_float
from keras_lowbit.kinds import TRANSPARENT, kind_of
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.numerics.packing import packed_size
from keras_lowbit.quantizers.sites import quantizers_of

FLOAT_BITS = 32


@dataclass(frozen=True)
class Row:
    """One product, or one other call.

    Args:
        name: the layer's; separable layers give `<name>/depthwise` and `<name>/pointwise`.
        kind: class of the Keras layer or operation that it stands for.
        kernel_bits: width of the kernel's codes, 32 for a float kernel; `None` without a kernel.
        input_bits: width of the codes it reads, 32 for reals; `None` without a kernel, except for
            a `Quantize` that moves codes to another grid.
        output_shape: with `None` for the batch.
        parameters: numbers in the layer, grids not counted; 0 at a shared layer's later calls.
        code_bytes: bytes of the packed codes.
        float_bytes: 4 for each number that stays float32: biases, batch norms, scales, and
            kernels without codes.
        macs: products of one sample; `None` where the output's size is dynamic.
        why_float: why it computes with reals in the exported sense; `None` where it does not.
        calibrated: False where a grid of activations never saw data.
        note: anything else worth a line.
    """

    name: str
    kind: str
    kernel_bits: int | None
    input_bits: int | None
    output_shape: tuple
    parameters: int
    code_bytes: int
    float_bytes: int
    macs: int | None
    why_float: str | None = None
    calibrated: bool = True
    note: str = ""

    @property
    def bit_operations(self) -> int | None:
        """`macs * kernel_bits * input_bits`; 0 without products."""
        if self.kernel_bits is None:
            return 0
        return None if self.macs is None else self.macs * self.kernel_bits * self.input_bits

    @property
    def bytes(self) -> int:
        """Codes and what stays float32."""
        return self.code_bytes + self.float_bytes

    @property
    def remarks(self) -> str:
        """The last column of the table."""
        parts = [self.note, self.why_float and f"float: {self.why_float}"]
        parts.append("" if self.calibrated else "uncalibrated")
        return "; ".join(p for p in parts if p)


def rows_of(program: walk.Program) -> Iterator[Row]:
    """A row for each call, two for a separable layer, in execution order."""
    whys = why_float(program)
    producers = program.producers()
    seen: set[int] = set()
    for call in program.calls:
        yield from _rows(call, whys.get(call.name), producers, seen)
        seen.add(id(call.operation))


def _rows(call, why, producers, seen):
    layer, kind = call.operation, kind_of(call)
    repeated = id(layer) in seen
    common = {"kind": type(layer).__name__.removeprefix("Quantized"), "why_float": why}
    note = "shared: its weights are counted at the first call" if repeated else ""
    source = _grid_of(call.inputs[0], producers) if call.inputs else None
    own = [getattr(layer, name, None) for name in ("input_quantizer", "output_quantizer")]
    calibrated = all(_is_calibrated(q) for q in (source, *own))
    if kind == "product":
        yield from _products(call, common, note, source or own[0], calibrated, repeated)
        return
    input_bits = None
    if kind == "quantize":
        producer = producers.get(call.inputs[0].index)
        calibrated = _is_calibrated(layer.quantizer)
        if producer is not None and kind_of(producer) == "dequantize":
            before = _grid_of(producer.inputs[0], producers)
            input_bits = before.bits
            note = f"moves codes from {before.bits} to {layer.quantizer.bits} bits"
    else:
        calibrated = True
    shapes = [ref.shape for ref in walk.refs(call.outputs)]
    yield Row(
        name=call.name,
        kernel_bits=None,
        input_bits=input_bits,
        output_shape=shapes[0] if shapes else (),
        parameters=0 if repeated else _parameters(layer),
        code_bytes=0,
        float_bytes=0 if repeated else _float_bytes(layer),
        macs=0,
        calibrated=calibrated,
        note=note,
        **common,
    )


def _products(call, common, note, source, calibrated, repeated):
    """The row of a layer with a kernel; two rows for a separable one."""
    layer = call.operation
    input_bits = FLOAT_BITS if source is None else source.bits
    parts = _parts(layer)
    total, float_bytes = _parameters(layer), _float_bytes(layer)
    for i, (part, latent, quantizer) in enumerate(parts):
        last, size = i == len(parts) - 1, _size(latent)
        bits = FLOAT_BITS if quantizer is None else quantizer.bits
        shape = call.output.shape if last else _between(layer, call.output.shape, latent)
        positions = shape[1:-1]
        between = getattr(layer, "between_quantizer", None)
        # What is not a kernel (bias, scales) is counted with the last part.
        rest = float_bytes - sum(4 * _size(k) for _, k, q in parts if q is None)
        own_float = (4 * size if quantizer is None else 0) + (rest if last else 0)
        own_parameters = total - sum(_size(k) for _, k, _ in parts[:-1]) if last else size
        yield Row(
            name=f"{call.name}/{part}" if part else call.name,
            kernel_bits=bits,
            input_bits=input_bits,
            output_shape=shape,
            parameters=0 if repeated else own_parameters,
            code_bytes=0 if repeated or quantizer is None else packed_size(size, bits),
            float_bytes=0 if repeated else own_float,
            macs=None if None in positions else int(np.prod(positions, dtype=int)) * size,
            calibrated=calibrated and (not part or _is_calibrated(between)),
            note=note,
            **common,
        )
        input_bits = FLOAT_BITS if between is None else between.bits


def _parts(layer):
    """`[(part, kernel variable, quantizer)]`, for Keras' own layers too."""
    found = [(k.part, k.latent, k.quantizer) for k in kernels(layer)]
    if found:
        return found
    if isinstance(layer, keras.layers.SeparableConv2D):
        return [
            ("depthwise", layer.depthwise_kernel, None),
            ("pointwise", layer.pointwise_kernel, None),
        ]
    return [("", layer.kernel, None)]


def _between(layer, output_shape, depthwise):
    return (*output_shape[:-1], depthwise.shape[-2] * depthwise.shape[-1])


def _grid_of(ref, producers):
    """The quantizer of the `Quantize` that a tensor of codes comes from; `None` for reals."""
    call = producers.get(ref.index)
    # Pools of codes stay on their grid too.
    while call is not None and (
        kind_of(call) in TRANSPARENT or getattr(call.operation, "zero_point", None) is not None
    ):
        call = producers.get(call.inputs[0].index)
    return call.operation.quantizer if call is not None and kind_of(call) == "quantize" else None


def _is_calibrated(quantizer):
    return quantizer is None or quantizer.is_calibrated


def _size(variable):
    return int(np.prod(variable.shape, dtype=int))


def _parameters(layer):
    grids = {id(v) for _, q in quantizers_of(layer) for v in q.weights}
    return sum(_size(v) for v in getattr(layer, "weights", ()) if id(v) not in grids)


def _float_bytes(layer):
    # The state of schedules (bits, calibrated) is no part of what is shipped.
    skipped = {id(v) for _, q in quantizers_of(layer) for v in (q.bits_variable, q.calibrated)}
    skipped |= {id(k.latent) for k in kernels(layer) if k.quantizer is not None}
    return sum(4 * _size(v) for v in getattr(layer, "weights", ()) if id(v) not in skipped)
