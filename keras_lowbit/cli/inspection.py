"""What is in a `.keras` or a `.tflite`: layers or operations, bits, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_lowbit.analysis import summary
from keras_lowbit.cli import files
from keras_lowbit.integer import frozen
from keras_lowbit.integer import graph as ir
from keras_lowbit.progress import table
from keras_lowbit.whole_files import first_line
from tflite_export import runtime

# Names of `schema.TensorType` and their width; other types are shown without constants' range.
_BITS = {"INT4": 4, "INT8": 8, "UINT8": 8, "INT16": 16, "INT32": 32, "INT64": 64, "FLOAT32": 32}


def inspect(path: str | Path) -> str:
    """A table of what is in a file.

    Raises:
        ValueError: no such file, neither `.keras` nor `.tflite`, or a damaged one.
    """
    path = Path(path)
    if path.suffix == ".tflite":
        return _of_tflite(path)
    if path.suffix == ".keras":
        return _of_keras(path)
    files.check_file(path, "a .keras or a .tflite file")
    raise ValueError(f"{path}: expected a .keras or a .tflite file")


def _of_keras(path):
    model = files.load_model(path)
    kind = files.kind(model)
    head = f"{path}: {kind} Keras model, {path.stat().st_size:,} bytes on disk"
    if kind == "frozen":
        return f"{head}\n{_graph_table(frozen.graph_of(model))}"
    texts = []
    summary(model, print_fn=texts.append)
    return "\n".join([head, *texts])


def _graph_table(graph):
    rows = []
    for op in graph:
        product = isinstance(op, ir.Product)
        out = graph.tensors[op.output]
        rows.append(
            (
                op.output,
                op.kind,
                _shape(out.shape),
                out.dtype,
                op.kernel_bits if product else None,
                _shape(op.kernel.shape) if product else None,
                f"{sum(array.nbytes for array in op.constants.values()):,}",
            )
        )
    columns = ("tensor", "op", "shape", "type", "bits", "kernel", "bytes")
    return table("", columns, rows)


@dataclass(frozen=True)
class Constant:
    """A constant tensor of a file: `codes` are integers, or None where they cannot be read."""

    name: str
    shape: tuple[int, ...]
    kind: str
    size: int
    codes: np.ndarray | None

    def __str__(self):
        return f"{self.kind.lower()} {_shape(self.shape)}"


@dataclass(frozen=True)
class Operation:
    """One operation of a file: what it reads, computes and holds."""

    name: str
    outputs: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    constants: tuple[Constant, ...]


def operations(content: bytes) -> list[Operation]:
    """The operations of a `.tflite`, in execution order, subgraph after subgraph.

    Raises:
        ImportError: without the `tflite` extra.
        ValueError: a damaged file.
    """
    schema = runtime.require("ai_edge_litert.schema_py_generated")
    try:
        model = schema.ModelT.InitFromPackedBuf(content)
        return [
            _operation(schema, model, graph, operator)
            for graph in model.subgraphs
            for operator in graph.operators
        ]
    except Exception as error:  # offsets of a damaged file lead anywhere
        raise ValueError(f"it cannot be read as a .tflite ({type(error).__name__})") from error


def _operation(schema, model, graph, operator):
    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    name = _name_of(schema.BuiltinOperator, number)
    if code.customCode:
        name = f"{name} {_decoded(code.customCode)}"
    tensors = [graph.tensors[i] for i in operator.outputs if i >= 0]
    constants = [
        _constant(schema, model, graph.tensors[i])
        for i in operator.inputs
        if i >= 0 and model.buffers[graph.tensors[i].buffer].data is not None
    ]
    return Operation(
        name,
        tuple(_decoded(tensor.name) for tensor in tensors),
        _sizes(tensors[0]) if tensors else (),
        _name_of(schema.TensorType, tensors[0].type) if tensors else "",
        tuple(constants),
    )


def _constant(schema, model, tensor):
    data = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
    kind = _name_of(schema.TensorType, tensor.type)
    shape = _sizes(tensor)
    codes = None
    if kind == "INT4":
        # Two codes a byte, the first in the low half.
        halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
        codes = ((halves ^ 8).astype(np.int8) - 8).reshape(shape)
    elif kind in _BITS and kind != "FLOAT32":
        codes = data.view(np.dtype(kind.lower())).reshape(shape)
    return Constant(_decoded(tensor.name), shape, kind, data.nbytes, codes)


def _sizes(tensor):
    # Scalars have none, and neither has what other converters left open.
    return () if tensor.shape is None else tuple(int(n) for n in tensor.shape)


def _decoded(name):
    return (name or b"").decode()


def _name_of(kinds, number):
    names = [name for name, value in vars(kinds).items() if value == number]
    return names[0] if names else f"unknown {number}"


def _of_tflite(path):
    content = files.read_tflite(path)
    try:
        found = operations(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kernels, note = {}, ""
    try:
        kernels = runtime.kernel_sets(content)
    except ValueError as error:  # sizes left open, operations of others: good elsewhere
        note = f"\nIt cannot be run here: {first_line(error)}"
    rows, seen, total = [], set(), 0
    for op in found:
        fresh = [c for c in op.constants if c.name not in seen]
        seen.update(c.name for c in fresh)
        size = sum(c.size for c in fresh)
        total += size
        kernel = max(op.constants, key=lambda c: len(c.shape), default=None)
        rows.append(
            (
                op.outputs[0] if op.outputs else "",
                op.name,
                f"{op.kind.lower()} {_shape(op.shape)}",
                "" if kernel is None else str(kernel),
                "" if kernel is None else _range(kernel),
                f"{size:,}",
                kernels.get(op.outputs[0], "") if op.outputs else "",
            )
        )
    columns = ("tensor", "op", "output", "kernel", "codes", "bytes", "kernels")
    title = f"{path}: {len(content):,} bytes, {len(found)} operations, {total:,} bytes of constants"
    return table(title, columns, rows) + note


def _range(constant):
    """`-7..7, 4 bits`: the width that the codes need, whatever holds them."""
    if constant.codes is None or not constant.codes.size:
        return ""
    low, high = int(constant.codes.min()), int(constant.codes.max())
    bits = max((-low - 1 if low < 0 else low).bit_length(), max(high, 0).bit_length()) + 1
    return f"{low}..{high}, {bits} bits"


def _shape(shape):
    return "x".join(str(n) for n in shape)
