"""The integer graph: what a phone computes, as plain data.

`real = scale * (code - zero_point)` for every tensor. Arrays keep the Keras layout
(HWIO kernels, `(h, w, c, multiplier)` depthwise kernels); writers transpose.
Operations carry their constants, so a graph is one value that can be printed, interpreted
(`reference`), run in Keras (`frozen`) and written (`tflite_export.flatbuffer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

DTYPES = ("int8", "uint8", "int32", "float32")
ACTIVATIONS = ("none", "relu", "relu6", "relu_n1_to_1")


@dataclass(frozen=True)
class Tensor:
    """One value of the graph.

    Args:
        name: unique in the graph; leads back to the Keras layer.
        shape: with the batch axis, all static.
        dtype: one of `DTYPES`. `float32` tensors carry no grid.
        scale: written scale, reals per code, rounded to float32; `None` for float32.
        zero_point: the code that stands for 0.0.
        bits: width of the codes that the tensor can hold (information, not storage).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "int8"
    scale: float | None = None
    zero_point: int = 0
    bits: int = 8

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"Tensor {self.name}: dtype must be one of {DTYPES}. Got {self.dtype}")
        if self.scale is not None:
            object.__setattr__(self, "scale", float(np.float32(self.scale)))


@dataclass(frozen=True, eq=False)
class Op:
    """One operation. `name` is that of its output tensor; `source` names the Keras layer."""

    inputs: tuple[str, ...]
    output: str
    source: str = ""

    kind: ClassVar[str] = ""

    @property
    def attributes(self) -> dict[str, object]:
        """Everything except the wiring and the constants, for printing and writing."""
        skip = {"inputs", "output", "source"}
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in skip and not isinstance(getattr(self, f.name), np.ndarray)
        }

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """Arrays of the operation by field name."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }


@dataclass(frozen=True, eq=False)
class Product(Op):
    """Sum of products of codes, plus bias, one rounding to the output grid.

        acc = sum((x - zero_point) * kernel) + bias                       int32
        m[c] = (scale_in * kernel_scale[c]) / scale_out                   float32 at each step
        y = clip(rint(float32(acc) * m[c]) + zero_point_out)              half to even

    Args:
        kernel: int8 codes, output channels last (depthwise: `(h, w, c, multiplier)`).
        kernel_scale: float32, one positive value an output channel.
        bias: int32, one an output channel, in units of `scale_in * kernel_scale`.
        kernel_bits: width of the trained codes (information).
        storage: `"int8"` or `"int4"`: the container that a writer uses.
        activation: one of `ACTIVATIONS`; clips codes as the runtime does, by the output's scale.
    """

    kernel: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    kernel_scale: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    kernel_bits: int = 8
    storage: str = "int8"
    activation: str = "none"


@dataclass(frozen=True, eq=False)
class Conv2D(Product):
    """Kernel `(h, w, c_in / groups, c_out)`; groups follow from the input's channels."""

    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: str = "VALID"

    kind: ClassVar[str] = "conv_2d"


@dataclass(frozen=True, eq=False)
class DepthwiseConv2D(Product):
    """Kernel `(h, w, c, multiplier)`; output channel `c * multiplier + j`."""

    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: str = "VALID"

    kind: ClassVar[str] = "depthwise_conv_2d"


@dataclass(frozen=True, eq=False)
class FullyConnected(Product):
    """Kernel `(c_in, c_out)` on the last axis; other axes are kept."""

    kind: ClassVar[str] = "fully_connected"


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Sum of two tensors of one shape on their own grids (`reference.add` has the formula)."""

    activation: str = "none"

    kind: ClassVar[str] = "add"


@dataclass(frozen=True, eq=False)
class Multiply(Op):
    """Product of two tensors, axes of size 1 repeated; one rounding to the output grid.

        m = (scale_a * scale_b) / scale_out                     float32 at each step
        y = clip(rint(float32((a - zp_a) * (b - zp_b)) * m) + zp_out)

    Kernels on Arm round the exact product, half up; `fixed_point.settled_scale` finds output scales
    on which that gives the same codes, and `emit` writes those.
    """

    activation: str = "none"

    kind: ClassVar[str] = "multiply"


@dataclass(frozen=True, eq=False)
class MaxPool2D(Op):
    """Maximum of codes; input and output share one grid."""

    pool: tuple[int, int] = (2, 2)
    strides: tuple[int, int] = (2, 2)
    padding: str = "VALID"

    kind: ClassVar[str] = "max_pool_2d"


@dataclass(frozen=True, eq=False)
class AveragePool2D(Op):
    """Integer mean of raw codes, half away from zero; padding is not counted; one grid."""

    pool: tuple[int, int] = (2, 2)
    strides: tuple[int, int] = (2, 2)
    padding: str = "VALID"

    kind: ClassVar[str] = "average_pool_2d"


@dataclass(frozen=True, eq=False)
class Concatenate(Op):
    """Inputs and output on one identical grid. `axis` counts from 0 with the batch axis."""

    axis: int = -1

    kind: ClassVar[str] = "concatenation"


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """Pad with the zero point. `paddings`: (before, after) for every axis."""

    paddings: tuple[tuple[int, int], ...] = ()

    kind: ClassVar[str] = "pad"


@dataclass(frozen=True, eq=False)
class ResizeNearest(Op):
    """Every code repeated `factors` times along height and width; one grid."""

    factors: tuple[int, int] = (2, 2)

    kind: ClassVar[str] = "resize_nearest"


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """Same codes in the output's shape."""

    kind: ClassVar[str] = "reshape"


@dataclass(frozen=True, eq=False)
class Slice(Op):
    """Codes from `begin` on, as many as the output's shape has along every axis; one grid."""

    begin: tuple[int, ...] = ()

    kind: ClassVar[str] = "slice"


@dataclass(frozen=True, eq=False)
class Transpose(Op):
    """Axis `i` of the output is axis `order[i]` of the input; one grid."""

    order: tuple[int, ...] = ()

    kind: ClassVar[str] = "transpose"


@dataclass(frozen=True, eq=False)
class Softmax(Op):
    """`rint(256 p) - 128` on the last axis; the output grid is scale 1/256, zero point -128."""

    kind: ClassVar[str] = "softmax"


@dataclass(frozen=True, eq=False)
class Logistic(Op):
    """`rint(256 sigmoid) - 128`; the output grid is scale 1/256, zero point -128."""

    kind: ClassVar[str] = "logistic"


@dataclass(frozen=True, eq=False)
class Quantize(Op):
    """The border of the graph: float32 or uint8 to int8, or int8 to uint8."""

    kind: ClassVar[str] = "quantize"


@dataclass(frozen=True, eq=False)
class Dequantize(Op):
    """The border of the graph: int8 or uint8 codes to float32."""

    kind: ClassVar[str] = "dequantize"


@dataclass(frozen=True)
class Graph:
    """Tensors by name and operations in execution order."""

    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self):
        known = set(self.inputs)
        for op in self.ops:
            for name in op.inputs:
                if name not in known:
                    raise ValueError(
                        f"{op.kind} {op.output}: input {name} is not computed before it"
                    )
            known.add(op.output)
        missing = [n for n in (*known, *self.outputs) if n not in self.tensors]
        if missing:
            raise ValueError(f"Graph: no tensor for {missing}")
        lost = [n for n in self.outputs if n not in known]
        if lost:
            raise ValueError(f"Graph: outputs {lost} are not computed")

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def readers(self, name: str) -> tuple[Op, ...]:
        """Operations that read tensor `name`."""
        return tuple(op for op in self.ops if name in op.inputs)


def dump(graph: Graph) -> str:
    """One line an operation, for people and for golden tests."""

    def show(name):
        t = graph.tensors[name]
        shape = ",".join(str(n) for n in t.shape)
        grid = "" if t.scale is None else f" *{t.scale:.6g} {t.zero_point}"
        return f"{t.dtype}[{shape}]{grid}"

    lines = []
    for op in graph.ops:
        inputs = ", ".join(show(n) for n in op.inputs)
        notes = []
        for key, value in op.attributes.items():
            if value not in ("none", "int8"):
                notes.append(f"{key}={value}".replace(" ", ""))
        if isinstance(op, Product):
            shape = ",".join(str(n) for n in op.kernel.shape)
            notes.insert(0, f"kernel[{shape}]")
        lines.append(
            f"{op.kind:18} {inputs} -> {show(op.output)}  {' '.join(notes)}  # {op.output}"
        )
    return "\n".join(lines) + "\n"
