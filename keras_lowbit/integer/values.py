"""The values that a lowering passes around.

Keras tensors become one of two things. `OnGrid` is a tensor of the graph with its grid. Anything
else is *pending*: products, sums and moves that wait for the grid on which a `Quantize` will put
them; only then operations are emitted. So batch norm, activations and biases melt into the
operation before them, and a pool or a concatenation before a `Quantize` takes its grid.

How a grid lives in int8, and why kernels' scales move by `written / true` of their neighbours:
`container`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_lowbit.integer import graph as ir
from keras_lowbit.numerics.grid import Grid


class NotExportable(ValueError):
    """The model cannot become an integer graph; the message names layers and ways out."""


@dataclass(frozen=True)
class Container:
    """How a grid is written: `zero_point`, `scale` and the fused activation that clips it."""

    zero_point: int
    scale: float
    activation: str


def container(grid: Grid, relu: float | None = None) -> Container:
    """The int8 form of a grid.

    Only ratios of scales count in a product, so a scale may be written such that a fused
    activation clips at the grid's ends: `6 / hi` with RELU6 for unsigned grids, `1 / hi` with
    RELU_N1_TO_1 for symmetric ones. Grids that end where int8 ends keep their scale.

    Args:
        grid: scalar scale.
        relu: `None`, or the largest value that a ReLU in front lets pass (`inf` for a plain one).

    Raises:
        NotExportable: no fused activation clips to the grid's codes.
    """
    scale, zero_point = float(grid.scale), grid.zero_point
    if relu is not None and relu < scale * (grid.hi - 0.5):
        # A ReLU6 that ends below the grid's last code: its own end is written as 6.
        return Container(zero_point, 6.0 / max(round(relu / scale), 1), "relu6")
    if relu is not None and grid.lo < 0:
        if zero_point + grid.hi < 127:
            return Container(zero_point, 6.0 / grid.hi, "relu6")
        return Container(zero_point, scale, "relu")
    low_free = zero_point + grid.lo <= -128
    high_free = zero_point + grid.hi >= 127
    if low_free and high_free:
        return Container(zero_point, scale, "none")
    if grid.lo == 0:
        return Container(zero_point, 6.0 / grid.hi, "relu6")
    if grid.lo == -grid.hi:
        return Container(zero_point, 1.0 / grid.hi, "relu_n1_to_1")
    raise NotExportable(f"No fused activation clips to codes {grid.lo}..{grid.hi}")


@dataclass(frozen=True)
class OnGrid:
    """A tensor of the graph. `factor`: written scale over true scale."""

    tensor: str
    grid: Grid
    factor: float
    shape: tuple[int, ...]
    relu: float | None = None


@dataclass(frozen=True)
class Linear:
    """A product waiting for its grid: integer kernel, true scales, real bias by output channel."""

    op: type
    inputs: OnGrid
    kernel: np.ndarray
    kernel_scale: np.ndarray
    bias: np.ndarray
    kernel_bits: int
    shape: tuple[int, ...]
    source: str
    attributes: dict[str, Any]
    relu: float | None = None
    copies: bool = False  # each output reads one input, so its kernel code is free to choose

    def affine(self, gain, shift) -> Linear:
        """`gain * y + shift` by channel: gain's size goes to the scales, its sign to the codes."""
        sign = np.where(gain < 0, -1, 1).astype(self.kernel.dtype)
        depthwise = self.op is ir.DepthwiseConv2D
        signs = sign.reshape(self.kernel.shape[-2:]) if depthwise else sign
        return replace(
            self,
            kernel=self.kernel * signs,
            kernel_scale=self.kernel_scale * np.abs(gain),
            bias=self.bias * gain + shift,
        )


@dataclass(frozen=True)
class Biases:
    """Biases of a product as the model has them, as codes, and the reals of one code."""

    reals: np.ndarray
    codes: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Elementwise:
    """Two tensors to be added or multiplied on a grid to come."""

    op: type
    first: OnGrid
    second: OnGrid
    shape: tuple[int, ...]
    source: str
    relu: float | None = None


@dataclass(frozen=True)
class Moved:
    """Codes moved about: an operation whose inputs and output share one grid."""

    op: type
    parts: tuple[Any, ...]
    attributes: dict[str, Any]
    shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Image:
    """What an input takes, `real = scale * given + offset`; `pixels` where that is 0..255."""

    name: str
    scale: float | np.ndarray
    offset: float | np.ndarray
    shape: tuple[int, ...]
    pixels: bool = False


@dataclass(frozen=True)
class Probabilities:
    """The output of a softmax or a sigmoid on a tensor of the graph."""

    tensor: str
    shape: tuple[int, ...]


def with_relu(value, limit, source):
    """`clip(value, 0, limit)` of a pending value or a tensor."""
    if isinstance(value, Moved):
        return replace(value, parts=tuple(with_relu(p, limit, source) for p in value.parts))
    if isinstance(value, (Linear, Elementwise, OnGrid)):
        return replace(value, relu=limit if value.relu is None else min(limit, value.relu))
    raise NotExportable(f"{source}: a ReLU cannot follow {type(value).__name__.lower()}")
