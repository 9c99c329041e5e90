"""What stands in a written file, read back with the schema."""

import sys

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema

from keras_lowbit import __version__
from keras_lowbit.integer import graph as ir
from tests.tflite_export.graphs import Builder, small_network
from tflite_export import flatbuffer, runtime

pytestmark = [pytest.mark.once, pytest.mark.runtime]

NAMES = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}


def read(content):
    model = schema.ModelT.InitFromPackedBuf(content)
    return model, model.subgraphs[0]


def versions(content):
    codes = read(content)[0].operatorCodes
    return {NAMES[code.builtinCode]: code.version for code in codes}


def data(model, tensor):
    return np.asarray(model.buffers[tensor.buffer].data)


def tensor(subgraph, name):
    (found,) = (t for t in subgraph.tensors if t.name.decode() == name)
    return found


def test_operations_get_the_lowest_version_that_expresses_them():
    graph, _ = small_network()
    assert versions(flatbuffer.write(graph)) == {
        "QUANTIZE": 2,
        "PAD": 2,
        "CONV_2D": 3,
        "ADD": 2,
        "DEPTHWISE_CONV_2D": 3,
        "FULLY_CONNECTED": 4,
        "MAX_POOL_2D": 2,
        "AVERAGE_POOL_2D": 2,
        "CONCATENATION": 2,
        "RESHAPE": 1,
        "SOFTMAX": 2,
        "DEQUANTIZE": 2,
    }


def test_an_operator_without_options_says_so():
    b = Builder()
    y = b.op(ir.Logistic, b.input(1, 3), shape=(1, 3), scale=1 / 256, zero_point=-128)
    content = flatbuffer.write(b.graph(y))
    assert versions(content) == {"LOGISTIC": 2}


@pytest.mark.parametrize(
    ("kind", "kernel", "name"),
    [
        (ir.Conv2D, (1, 1, 4, 6), "CONV_2D"),
        (ir.DepthwiseConv2D, (1, 1, 4, 1), "DEPTHWISE_CONV_2D"),
        (ir.FullyConnected, (4, 6), "FULLY_CONNECTED"),
    ],
)
def test_int4_kernels_ask_for_the_version_that_knows_int4(kind, kernel, name):
    b = Builder()
    x = b.input(1, 3, 3, 4)
    shape = (1, 3, 3, 4 if kind is ir.DepthwiseConv2D else 6)
    y = b.product(kind, x, kernel, shape, codes=(-7, 8), storage="int4")
    expected = 10 if kind is ir.FullyConnected else 7
    assert versions(flatbuffer.write(b.graph(y))) == {name: expected}


def test_tensors_keep_names_shapes_and_grids():
    graph, _ = small_network()
    _, subgraph = read(flatbuffer.write(graph))
    for name, expected in graph.tensors.items():
        found = tensor(subgraph, name)
        assert tuple(found.shape) == expected.shape
        if expected.scale is not None:
            assert float(found.quantization.scale[0]) == expected.scale
            assert found.quantization.zeroPoint[0] == expected.zero_point
    assert [subgraph.tensors[i].name.decode() for i in subgraph.inputs] == ["x"]
    assert [subgraph.tensors[i].name.decode() for i in subgraph.outputs] == ["probabilities"]


@pytest.mark.parametrize(
    ("kind", "kernel", "axes", "shape", "axis"),
    [
        (ir.Conv2D, (3, 2, 4, 5), (3, 0, 1, 2), (5, 3, 2, 4), 0),
        (ir.DepthwiseConv2D, (3, 2, 4, 2), (0, 1, 2, 3), (1, 3, 2, 8), 3),
        (ir.FullyConnected, (4, 5), (1, 0), (5, 4), 0),
    ],
)
def test_kernels_lie_in_the_runtimes_layout_with_a_scale_a_channel(kind, kernel, axes, shape, axis):
    b = Builder()
    x = b.input(1, 7, 6, 4)
    out = {ir.Conv2D: (1, 5, 5, 5), ir.DepthwiseConv2D: (1, 5, 5, 8)}.get(kind, (1, 7, 6, 5))
    y = b.product(kind, x, kernel, out)
    model, subgraph = read(flatbuffer.write(b.graph(y)))
    (op,) = b.ops
    stored = tensor(subgraph, f"{y}/kernel")
    assert tuple(stored.shape) == shape
    expected = np.transpose(op.kernel, axes).reshape(shape)
    np.testing.assert_array_equal(data(model, stored).view(np.int8).reshape(shape), expected)
    np.testing.assert_array_equal(stored.quantization.scale, op.kernel_scale)
    assert stored.quantization.quantizedDimension == axis
    bias = tensor(subgraph, f"{y}/bias")
    np.testing.assert_array_equal(data(model, bias).view(np.int32), op.bias)
    np.testing.assert_array_equal(
        bias.quantization.scale, np.float32(b.tensors[x].scale) * op.kernel_scale
    )


def test_int4_kernels_take_half_a_byte_low_nibble_first():
    b = Builder()
    x = b.input(1, 2)
    y = b.product(ir.FullyConnected, x, (2, 3), (1, 3), storage="int4", codes=(-8, 8))
    kernel = b.ops[0].kernel
    kernel[:] = [[1, -1, 7], [2, -8, 0]]
    model, subgraph = read(flatbuffer.write(b.graph(y)))
    stored = tensor(subgraph, f"{y}/kernel")
    assert stored.type == schema.TensorType.INT4
    np.testing.assert_array_equal(data(model, stored), [0x21, 0x8F, 0x07])


def test_fully_connected_keeps_its_axes_above_rank_two():
    for lead, keeps in (((1,), False), ((1, 3), True), ((1, 3, 2), True)):
        b = Builder()
        x = b.input(*lead, 4)
        y = b.product(ir.FullyConnected, x, (4, 2), (*lead, 2))
        content = flatbuffer.write(b.graph(y))
        assert read(content)[1].operators[0].builtinOptions.keepNumDims is keeps
        assert versions(content) == {"FULLY_CONNECTED": 5 if keeps else 4}


def test_the_signature_names_inputs_and_outputs():
    graph, images = small_network()
    interpreter = runtime.open_interpreter(flatbuffer.write(graph))
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["x"], "outputs": ["probabilities"]}
    }
    out = interpreter.get_signature_runner("serving_default")(x=images[:1])
    assert out["probabilities"].shape == (1, 10)


def test_the_file_says_who_wrote_it():
    graph, _ = small_network()
    content = flatbuffer.write(graph)
    model, _ = read(content)
    assert content[4:8] == b"TFL3"
    assert model.description.decode() == f"keras_lowbit {__version__}"
    (note,) = model.metadata
    assert note.name == b"keras_lowbit"
    assert bytes(model.buffers[note.buffer].data).decode() == __version__


@pytest.mark.parametrize("all_outputs", [False, True])
def test_constants_are_aligned_to_sixteen_bytes(all_outputs):
    graph, _ = small_network()
    content = flatbuffer.write(graph, all_outputs=all_outputs)
    model, _ = read(content)
    # Long enough, and not of zeros, so that they are found only where they are.
    stored = [b.data for b in model.buffers if b.data is not None]
    constants = [data.tobytes() for data in stored if data.size > 16 and data.any()]
    assert len(constants) > 5
    assert [content.find(constant) % 16 for constant in constants] == [0] * len(constants)


def test_equal_constants_are_stored_once():
    b = Builder()
    x = b.input(1, 4)
    y = b.same_grid(ir.Reshape, x, shape=(1, 4))
    z = b.same_grid(ir.Reshape, y, shape=(1, 4))
    model, subgraph = read(flatbuffer.write(b.graph(z)))
    assert tensor(subgraph, f"{y}/shape").buffer == tensor(subgraph, f"{z}/shape").buffer
    assert len(model.buffers) == 3  # nothing, the shape, the version


def test_the_verification_copy_lists_every_tensor_in_the_same_kernels():
    graph, _ = small_network()
    content, copy = flatbuffer.write(graph), flatbuffer.write(graph, all_outputs=True)
    _, subgraph = read(copy)
    names = [subgraph.tensors[i].name.decode() for i in subgraph.outputs]
    assert names == [op.output for op in graph]
    assert runtime.kernel_sets(copy) == runtime.kernel_sets(content)


def test_writing_twice_gives_the_same_bytes():
    graph, _ = small_network()
    assert flatbuffer.write(graph) == flatbuffer.write(graph)


def test_a_constant_does_not_take_a_tensors_name():
    b = Builder()
    x = b.input(1, 4, name="y/bias")
    y = b.product(ir.FullyConnected, x, (4, 2), (1, 2), name="y")
    _, subgraph = read(flatbuffer.write(b.graph(y)))
    names = [t.name.decode() for t in subgraph.tensors]
    assert len(set(names)) == len(names) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": "int3"}, "'int8' or 'int4'. Got 'int3'"),
        ({"padding": "full"}, "'SAME' or 'VALID'. Got 'full'"),
        ({"activation": "tanh"}, "relu6.*Got 'tanh'"),
    ],
)
def test_what_the_format_does_not_know_is_refused_by_name(fields, message):
    b = Builder()
    x = b.input(1, 3, 3, 2)
    y = b.product(ir.Conv2D, x, (1, 1, 2, 2), (1, 3, 3, 2), name="layer", **fields)
    with pytest.raises(ValueError, match=f"layer: .*{message}"):
        flatbuffer.write(b.graph(y))


def test_only_tflite_files_can_be_copied():
    with pytest.raises(ValueError, match=r"Not a \.tflite file"):
        flatbuffer.with_all_outputs(b"something else")


def test_every_operation_of_the_graph_can_be_written():
    kinds = {c for c in vars(ir).values() if isinstance(c, type) and getattr(c, "kind", "")}
    assert set(flatbuffer._OPERATIONS) == kinds


def test_without_the_schema_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(ImportError, match=r"pip install keras-lowbit\[tflite\]"):
        runtime.require("ai_edge_litert.schema_py_generated")
