"""An integer graph as the bytes of a `.tflite` file: the only file that knows the schema.

It needs the `tflite` extra, so whoever writes files imports it where that is done.
"""

from __future__ import annotations

import numpy as np

from keras_lowbit import __version__
from keras_lowbit.integer import graph as ir
from keras_lowbit.numerics.packing import pack
from tflite_export.runtime import require

flatbuffers = require("flatbuffers")
schema = require("ai_edge_litert.schema_py_generated")

SIGNATURE = "serving_default"
FILE_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # what the runtime asks of constant data

_Code = schema.BuiltinOperator


def write(graph: ir.Graph, *, all_outputs: bool = False, joins_zeros: bool = False) -> bytes:
    """The graph as a `.tflite` file.

    Tensors keep their names and shapes; every operation gets the lowest version that expresses
    it, so that old runtimes load the file.

    Args:
        graph: the integer graph.
        all_outputs: make every computed tensor an output of the file: the verification copy.
            Inside a delegate a tensor that is no output cannot be read.
        joins_zeros: write a pad of channels as concatenations with constant zeros, one a side.

    Raises:
        ValueError: for a storage, padding or activation that the format does not know.
    """
    writer = _Writer(graph, joins_zeros)
    for op in graph:
        writer.add(op)
    content = writer.finish()
    return with_all_outputs(content) if all_outputs else content


def with_all_outputs(content: bytes) -> bytes:
    """A copy of a file whose outputs are all tensors that its operations compute.

    This keeps the delegate's partition whole, so the copy computes what the file computes.

    Raises:
        ValueError: if `content` is no `.tflite` file.
    """
    if content[4:8] != FILE_IDENTIFIER:
        raise ValueError(f"Not a .tflite file: it lacks the identifier {FILE_IDENTIFIER!r}.")
    model = schema.ModelT.InitFromPackedBuf(content)
    (subgraph,) = model.subgraphs
    subgraph.outputs = [index for operator in subgraph.operators for index in operator.outputs]
    model.signatureDefs = None  # it lists the outputs that were
    model.buffers = [
        buffer if buffer.data is None else _new(_AlignedBuffer, data=buffer.data)
        for buffer in model.buffers
    ]
    return _packed(model, len(content))


def _packed(model, size_hint):
    builder = _Builder(size_hint + 4096)
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    return bytes(builder.Output())


def _new(kind, **fields):
    """An object of the schema with some fields set; in LiteRT 2.0 they take no arguments."""
    entry = kind()
    for name, value in fields.items():
        getattr(entry, name)  # a misspelt field is an error
        setattr(entry, name, value)
    return entry


class _Writer:
    """Collects tensors, buffers and operators in the order in which they are added."""

    def __init__(self, graph, joins_zeros=False):
        self.graph = graph
        self.joins_zeros = joins_zeros
        self.buffers = [schema.BufferT()]  # buffer 0 means "no data"
        self.buffer_index = {}  # equal constants share one buffer
        self.codes = {}  # (operator, version) -> index
        self.operators = []
        self.tensors = []
        self.index = {}
        for name in (*graph.inputs, *(op.output for op in graph)):
            t = graph.tensors[name]
            grid = None if t.scale is None else _grid([t.scale], [t.zero_point])
            self._append(name, t.shape, t.dtype, grid)

    def _append(self, name, shape, dtype, grid=None, buffer=0):
        self.index[name] = len(self.tensors)
        tensor = _new(schema.TensorT, name=name, shape=list(shape), quantization=grid)
        tensor.type, tensor.buffer = getattr(schema.TensorType, dtype.upper()), buffer
        self.tensors.append(tensor)
        return self.index[name]

    def buffer(self, data: bytes):
        if data not in self.buffer_index:
            self.buffer_index[data] = len(self.buffers)
            self.buffers.append(_new(_AlignedBuffer, data=np.frombuffer(data, np.uint8)))
        return self.buffer_index[data]

    def constant(self, name, array, dtype, grid=None):
        """Add a constant tensor; returns its index."""
        data = pack(array, 4) if dtype == "int4" else np.ascontiguousarray(array, dtype)
        return self._append(self._free(name), array.shape, dtype, grid, self.buffer(data.tobytes()))

    def between(self, name, output, shape):
        """Add a computed tensor of the grid of `output` that the graph does not know."""
        t = self.graph.tensors[output]
        return self._append(self._free(name), shape, t.dtype, _grid([t.scale], [t.zero_point]))

    def _free(self, name):
        while name in self.index or name in self.graph.tensors:
            name += "_"
        return name

    def add(self, op):
        if isinstance(op, ir.Pad) and self.joins_zeros and any(op.paddings[-1]):
            return _join_zeros(self, op)
        code, version, constants, options = _OPERATIONS[type(op)](self, op)
        inputs = [self.index[name] for name in op.inputs] + constants
        return self.operator(code, version, inputs, self.index[op.output], options)

    def operator(self, code, version, inputs, output, options):
        """Add an operator on tensors of these indices; returns that of its output."""
        operator = _new(
            schema.OperatorT,
            opcodeIndex=self.codes.setdefault((code, version), len(self.codes)),
            inputs=inputs,
            outputs=[output],
            # FooOptionsT travels in a union whose tag is FooOptions; some operators have none.
            builtinOptionsType=getattr(
                schema.BuiltinOptions, "NONE" if options is None else type(options).__name__[:-1]
            ),
            builtinOptions=options,
        )
        self.operators.append(operator)
        return output

    def finish(self):
        inputs = {name: self.index[name] for name in self.graph.inputs}
        outputs = {name: self.index[name] for name in self.graph.outputs}
        subgraph = _new(schema.SubGraphT, tensors=self.tensors, operators=self.operators)
        subgraph.inputs, subgraph.outputs = list(inputs.values()), list(outputs.values())
        signature = _new(schema.SignatureDefT, signatureKey=SIGNATURE)
        signature.inputs, signature.outputs = _tensor_maps(inputs), _tensor_maps(outputs)
        note = _new(schema.MetadataT, name="keras_lowbit", buffer=self.buffer(__version__.encode()))
        model = _new(
            schema.ModelT,
            version=3,
            description=f"keras_lowbit {__version__}",
            operatorCodes=[_operator_code(*key) for key in self.codes],
            buffers=self.buffers,
        )
        model.subgraphs, model.signatureDefs, model.metadata = [subgraph], [signature], [note]
        return _packed(model, sum(len(data) for data in self.buffer_index))


class _Builder(flatbuffers.Builder):
    """A builder that writes equal vectors once; readers follow offsets and do not mind."""

    def __init__(self, size):
        super().__init__(size)
        self.vectors = {}

    def shared(self, array):
        """The offset of a vector with the content of `array`."""
        key = (array.dtype.str, array.tobytes())
        if key not in self.vectors:
            self.vectors[key] = self.CreateNumpyVector(array)
        return self.vectors[key]


class _Grid(schema.QuantizationParametersT):
    """Scales and zero points; a file of many channels holds the same zeros again and again."""

    def Pack(self, builder):
        scale, zero_point = builder.shared(self.scale), builder.shared(self.zeroPoint)
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, scale)
        schema.QuantizationParametersAddZeroPoint(builder, zero_point)
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
        return schema.QuantizationParametersEnd(builder)


class _AlignedBuffer(schema.BufferT):
    """The generated `BufferT` aligns data to four bytes only."""

    def Pack(self, builder):
        builder.StartVector(1, len(self.data), _ALIGNMENT)
        builder.head -= len(self.data)
        builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.tobytes()
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def _grid(scales, zero_points, axis=0):
    grid = _new(_Grid, quantizedDimension=axis)
    grid.scale, grid.zeroPoint = np.asarray(scales, np.float32), np.asarray(zero_points, np.int64)
    return grid


def _tensor_maps(indices):
    return [_new(schema.TensorMapT, name=n, tensorIndex=i) for n, i in indices.items()]


def _operator_code(code, version):
    entry = _new(schema.OperatorCodeT, builtinCode=code, version=version)
    entry.deprecatedBuiltinCode = min(code, 127)  # one byte, for readers of old
    return entry


def _product(writer, op, kernel, axis):
    """Constants of a product: the kernel in the runtime's layout, and the bias."""
    if op.storage not in ("int8", "int4"):
        raise ValueError(f"{op.output}: storage must be 'int8' or 'int4'. Got {op.storage!r}")
    scales = np.broadcast_to(np.asarray(op.kernel_scale, np.float32), op.bias.shape)
    zeros = np.zeros(len(scales), np.int64)
    bias_scale = np.float32(writer.graph.tensors[op.inputs[0]].scale) * scales
    return [
        writer.constant(f"{op.output}/kernel", kernel, op.storage, _grid(scales, zeros, axis)),
        writer.constant(f"{op.output}/bias", op.bias, "int32", _grid(bias_scale, zeros)),
    ]


def _activation(op):
    if op.activation not in ir.ACTIVATIONS:
        raise ValueError(
            f"{op.output}: activation must be one of {ir.ACTIVATIONS}. Got {op.activation!r}"
        )
    return getattr(schema.ActivationFunctionType, op.activation.upper())


def _window(op):
    """Fields that convolutions and pools share."""
    if op.padding not in ("SAME", "VALID"):
        raise ValueError(f"{op.output}: padding must be 'SAME' or 'VALID'. Got {op.padding!r}")
    padding = getattr(schema.Padding, op.padding)
    return {"padding": padding, "strideH": op.strides[0], "strideW": op.strides[1]}


def _convolution(op):
    """Fields that both convolutions share."""
    return _window(op) | {
        "dilationHFactor": op.dilation[0],
        "dilationWFactor": op.dilation[1],
        "fusedActivationFunction": _activation(op),
    }


def _conv_2d(writer, op):
    constants = _product(writer, op, np.transpose(op.kernel, (3, 0, 1, 2)), 0)
    options = _new(schema.Conv2DOptionsT, **_convolution(op))
    return _Code.CONV_2D, 7 if op.storage == "int4" else 3, constants, options


def _depthwise_conv_2d(writer, op):
    constants = _product(writer, op, op.kernel.reshape(1, *op.kernel.shape[:2], -1), 3)
    options = _new(schema.DepthwiseConv2DOptionsT, **_convolution(op))
    options.depthMultiplier = op.kernel.shape[3]
    return _Code.DEPTHWISE_CONV_2D, 7 if op.storage == "int4" else 3, constants, options


def _fully_connected(writer, op):
    keep = len(writer.graph.tensors[op.inputs[0]].shape) > 2
    version = 10 if op.storage == "int4" else 5 if keep else 4
    options = _new(schema.FullyConnectedOptionsT, keepNumDims=keep)
    options.fusedActivationFunction = _activation(op)
    constants = _product(writer, op, np.transpose(op.kernel), 0)
    return _Code.FULLY_CONNECTED, version, constants, options


def _add(writer, op):
    options = _new(schema.AddOptionsT, fusedActivationFunction=_activation(op))
    return _Code.ADD, 2, [], options


def _multiply(writer, op):
    options = _new(schema.MulOptionsT, fusedActivationFunction=_activation(op))
    return _Code.MUL, 2, [], options


def _pool(code, op):
    options = _new(schema.Pool2DOptionsT, **_window(op))
    options.filterHeight, options.filterWidth = op.pool
    return code, 2, [], options


def _concatenate(writer, op):
    rank = len(writer.graph.tensors[op.output].shape)
    return _concatenation(op.axis % rank)


def _concatenation(axis):
    return _Code.CONCATENATION, 2, [], _new(schema.ConcatenationOptionsT, axis=axis)


def _pad(writer, op, paddings=None):
    paddings = np.asarray(op.paddings if paddings is None else paddings)
    constant = writer.constant(f"{op.output}/paddings", paddings, "int32")
    return _Code.PAD, 2, [constant], schema.PadOptionsT()


def _join_zeros(writer, op):
    """A pad whose channels come by concatenations, each of two tensors, one of them zeros."""
    source, result = (writer.graph.tensors[name] for name in (*op.inputs, op.output))
    x, shape = writer.index[source.name], (*result.shape[:-1], source.shape[-1])
    inner = (*op.paddings[:-1], (0, 0))
    if any(map(any, inner)):
        padded = writer.between(f"{op.output}/padded", op.output, shape)
        code, version, constants, options = _pad(writer, op, inner)
        x = writer.operator(code, version, [x, *constants], padded, options)
    before, after = op.paddings[-1]
    widths = [(side, n) for side, n in (("after", after), ("before", before)) if n]
    code, version, _, options = _concatenation(len(shape) - 1)
    for side, n in widths:
        zeros = np.full((*shape[:-1], n), result.zero_point)
        grid = _grid([result.scale], [result.zero_point])
        zeros = writer.constant(f"{op.output}/{side}", zeros, result.dtype, grid)
        shape = (*shape[:-1], shape[-1] + n)
        joined = (
            writer.index[op.output]
            if shape == result.shape
            else writer.between(f"{op.output}/joined", op.output, shape)
        )
        inputs = [x, zeros] if side == "after" else [zeros, x]
        x = writer.operator(code, version, inputs, joined, options)


def _resize_nearest(writer, op):
    shape = writer.graph.tensors[op.output].shape[1:3]
    size = writer.constant(f"{op.output}/size", np.asarray(shape), "int32")
    return _Code.RESIZE_NEAREST_NEIGHBOR, 2, [size], schema.ResizeNearestNeighborOptionsT()


def _reshape(writer, op):
    shape = writer.graph.tensors[op.output].shape
    constant = writer.constant(f"{op.output}/shape", np.asarray(shape), "int32")
    return _Code.RESHAPE, 1, [constant], _new(schema.ReshapeOptionsT, newShape=list(shape))


def _slice(writer, op):
    shape = writer.graph.tensors[op.output].shape
    ends = [
        writer.constant(f"{op.output}/{name}", np.asarray(value), "int32")
        for name, value in (("begin", op.begin), ("size", shape))
    ]
    return _Code.SLICE, 2, ends, schema.SliceOptionsT()


def _transpose(writer, op):
    order = writer.constant(f"{op.output}/order", np.asarray(op.order), "int32")
    return _Code.TRANSPOSE, 2, [order], schema.TransposeOptionsT()


def _softmax(writer, op):
    return _Code.SOFTMAX, 2, [], _new(schema.SoftmaxOptionsT, beta=1.0)


def _logistic(writer, op):
    return _Code.LOGISTIC, 2, [], None


def _quantize(writer, op):
    from_float = writer.graph.tensors[op.inputs[0]].dtype == "float32"
    return _Code.QUANTIZE, 1 if from_float else 2, [], schema.QuantizeOptionsT()


def _dequantize(writer, op):
    from_uint8 = writer.graph.tensors[op.inputs[0]].dtype == "uint8"
    return _Code.DEQUANTIZE, 1 if from_uint8 else 2, [], schema.DequantizeOptionsT()


# Type of operation -> function(writer, op) -> (operator, version, constant tensors, options).
_OPERATIONS = {
    ir.Conv2D: _conv_2d,
    ir.DepthwiseConv2D: _depthwise_conv_2d,
    ir.FullyConnected: _fully_connected,
    ir.Add: _add,
    ir.Multiply: _multiply,
    ir.MaxPool2D: lambda writer, op: _pool(_Code.MAX_POOL_2D, op),
    ir.AveragePool2D: lambda writer, op: _pool(_Code.AVERAGE_POOL_2D, op),
    ir.Concatenate: _concatenate,
    ir.Pad: _pad,
    ir.ResizeNearest: _resize_nearest,
    ir.Reshape: _reshape,
    ir.Slice: _slice,
    ir.Transpose: _transpose,
    ir.Softmax: _softmax,
    ir.Logistic: _logistic,
    ir.Quantize: _quantize,
    ir.Dequantize: _dequantize,
}
