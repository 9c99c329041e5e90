"""What each target takes, and the sentence with which it refuses the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from keras_lowbit.checks import did_you_mean
from keras_lowbit.integer import graph as ir

LARGEST_CORAL_SOFTMAX = 16_000


@dataclass(frozen=True)
class Target:
    """A place where files run.

    Args:
        name: as given to `convert`.
        runtime: the runtime whose kernels the file is written for.
        objections: sentences against an operation that gives a tensor of a shape; empty where it
            is fine.
        largest_batch: images that a file can take at a time; `None` for any number.
        joins_zeros: pads of channels are written as concatenations with zeros.
    """

    name: str
    runtime: str
    objections: Callable[[ir.Op, tuple[int, ...]], list[str]]
    largest_batch: int | None = None
    joins_zeros: bool = False


# Axes beyond which kernels refuse a file, or multiply repeated values by others than meant.
_MOST_AXES = {ir.Pad: 6, ir.Concatenate: 6, ir.FullyConnected: 6, ir.Multiply: 6}
_MOST_AXES_BUILTIN = {**_MOST_AXES, ir.Pad: 5, ir.Slice: 5, ir.Transpose: 6}


def _axes(op: ir.Op, shape: tuple[int, ...], most: Mapping[type[ir.Op], int]) -> list[str]:
    limit = most.get(type(op), len(shape))
    if len(shape) <= limit:
        return []
    return [
        f"it takes at most {limit} axes there, that of images counted. Got {shape}; join axes with "
        "a Reshape before it, and part them behind it"
    ]


def _android(op: ir.Op, shape: tuple[int, ...]) -> list[str]:
    return _axes(op, shape, _MOST_AXES)


def _old_builtin(op: ir.Op, shape: tuple[int, ...]) -> list[str]:
    found = _axes(op, shape, _MOST_AXES_BUILTIN)
    if isinstance(op, ir.FullyConnected) and op.storage == "int4":
        found.append("tflite-runtime 2.14 loads no int4 FULLY_CONNECTED; use weights='int8'")
    return found


def _coral(op: ir.Op, shape: tuple[int, ...]) -> list[str]:
    """What the Edge TPU's compiler would leave to the CPU, with all that follows.

    The operations are those of coral.ai/docs/edgetpu/models-intro ("Supported operations"). The
    compiler has the last word, for it also refuses by size. It refuses CONV_2D of version 6 and on
    (google-coral/edgetpu, issue 631); int8 files hold version 3.
    """
    found = []
    if isinstance(op, ir.Product) and op.storage != "int8":
        found.append("the Edge TPU reads kernels of 8 bits only; use weights='int8'")
    if any(n > 1 for n in shape[:-3]):
        found.append(
            f"on the Edge TPU only the three innermost axes may be longer than 1. Got {shape}"
        )
    dilation = getattr(op, "dilation", (1, 1))
    if dilation[0] != dilation[1]:
        found.append(f"the Edge TPU dilates alike in both directions. Got {dilation}")
    vector = all(n == 1 for n in shape[1:-1])
    # An int4 one may be a 1x1 convolution, which the writer writes so.
    if isinstance(op, ir.FullyConnected) and op.storage == "int8" and not vector:
        found.append(
            f"a dense layer's output must be one-dimensional on the Edge TPU. Got {shape[1:]}; "
            "write it as a 1x1 convolution"
        )
    if isinstance(op, ir.Softmax) and not (vector and shape[-1] <= LARGEST_CORAL_SOFTMAX):
        found.append(
            f"the Edge TPU takes a softmax over one dimension of at most {LARGEST_CORAL_SOFTMAX} "
            f"values. Got {shape[1:]}; end the model before it"
        )
    return found


TARGETS = {
    "android": Target("android", "LiteRT 2, default kernels (XNNPACK)", _android),
    "builtin": Target("builtin", "tflite-runtime 2.14 and newer, built-in kernels", _old_builtin),
    "coral": Target(
        "coral",
        "edgetpu_compiler 16 for Coral's Edge TPU",
        _coral,
        largest_batch=1,
        # Its PAD knows height and width only, its CONCATENATION two tensors, one of them zeros.
        joins_zeros=True,
    ),
}


def find(name: str) -> Target:
    """The target of a name; `ValueError` with the nearest one otherwise."""
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise ValueError(f"Unknown target {name!r}; known: {sorted(TARGETS)}.{hint}")


def objections(
    operations: Iterable[ir.Op], tensors: Mapping[str, ir.Tensor], target: Target
) -> list[str]:
    """Every objection of a target to a graph's operations, with the layer's name."""
    found = []
    for op in operations:
        shape = tensors[op.output].shape
        if target.largest_batch is not None and shape[0] > target.largest_batch and not found:
            found.append(f"files take {target.largest_batch} image at a time there. Got {shape[0]}")
        found += [f"{op.source} ({op.kind}): {why}" for why in target.objections(op, shape)]
    return found
