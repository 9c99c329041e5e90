"""One operation of an integer graph as a Keras layer: attributes as config, arrays as weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_lowbit.integer import arithmetic
from keras_lowbit.integer import graph as ir

_KINDS = {
    cls.kind: cls
    for cls in (
        ir.Conv2D,
        ir.DepthwiseConv2D,
        ir.FullyConnected,
        ir.Add,
        ir.Multiply,
        ir.MaxPool2D,
        ir.AveragePool2D,
        ir.Concatenate,
        ir.Pad,
        ir.ResizeNearest,
        ir.Reshape,
        ir.Slice,
        ir.Transpose,
        ir.Softmax,
        ir.Logistic,
        ir.Quantize,
        ir.Dequantize,
    )
}
# Names that are absent are float32.
CONSTANT_DTYPES = {"kernel": "int8", "bias": "int32"}


@keras.saving.register_keras_serializable(package="keras_lowbit")
class IntegerOp(keras.layers.Layer):
    """One operation of an integer graph. `frozen.build` makes these; nobody else needs to.

    Inputs and output hold integer codes in float32 tensors. Nothing is trainable.

    Args:
        kind: that of the operation, such as `"conv_2d"`.
        attributes: the operation's fields that are neither wiring nor arrays.
        inputs: the graph's input tensors, as dicts of `Tensor` fields.
        output: the graph's output tensor, likewise.
        source: the Keras layer that the operation came from.
        position: place of the operation in the graph's order of execution.
        constants: shapes of the constant arrays by name.
        split: see `arithmetic.Split`.
        values: constant arrays by name; absent when a file is loaded.
    """

    def __init__(
        self,
        kind: str,
        attributes: Mapping[str, object],
        inputs: list[Mapping[str, object]],
        output: Mapping[str, object],
        source: str = "",
        position: int = 0,
        constants: Mapping[str, list[int]] | None = None,
        split: tuple[bool, int] = arithmetic.WHOLE,
        values: Mapping[str, np.ndarray] | None = None,
        **kwargs,
    ):
        # Codes need float32 whatever policy is set: bfloat16 loses nearly every sum.
        kwargs.update(dtype="float32", trainable=False)
        super().__init__(**kwargs)
        self.grids = [ir.Tensor(**_tupled(grid)) for grid in inputs]
        self.out = ir.Tensor(**_tupled(output))
        self.op = _KINDS[kind](
            inputs=tuple(grid.name for grid in self.grids),
            output=self.out.name,
            source=source,
            **_tupled(attributes),
        )
        self.position = position
        self.split = arithmetic.Split(*split)
        self.constants = {
            name: self._constant(name, tuple(shape), values)
            for name, shape in (constants or {}).items()
        }

    def _constant(self, name, shape, values):
        dtype = CONSTANT_DTYPES.get(name, "float32")
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer=lambda *_, **__: np.zeros(shape, dtype) if values is None else values[name],
            trainable=False,
            autocast=False,
        )

    def call(self, inputs):
        """Codes of the output for one tensor of codes, or for a list of them."""
        operands = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return arithmetic.run(self.op, operands, self.grids, self.out, self.constants, self.split)

    def compute_output_spec(self, inputs):
        """Shape from the graph, batch from the input."""
        first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
        return keras.KerasTensor((first.shape[0], *self.out.shape[1:]), dtype="float32")

    def get_config(self):
        """Everything but the weights."""
        config = super().get_config()
        return config | {
            "kind": self.op.kind,
            "attributes": _plain(self.op.attributes),
            "inputs": [_plain(dataclasses.asdict(grid)) for grid in self.grids],
            "output": _plain(dataclasses.asdict(self.out)),
            "source": self.op.source,
            "position": self.position,
            "constants": {name: list(value.shape) for name, value in self.constants.items()},
            "split": list(self.split),
        }

    def graph_op(self) -> ir.Op:
        """The operation with its constants, as the graph holds it."""
        arrays = {
            name: np.array(ops.convert_to_numpy(self.constants[name])) for name in self.op.constants
        }
        return dataclasses.replace(self.op, **arrays)


def _plain(value):
    """Numbers, strings, lists and dicts only: what JSON keeps."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _tupled(value):
    """The inverse of `_plain` for the fields of a graph, whose sequences are all tuples."""
    if isinstance(value, Mapping):
        return {key: _tupled(v) for key, v in value.items()}
    return tuple(_tupled(v) for v in value) if isinstance(value, (tuple, list)) else value
