"""The reference equals LiteRT, and `verify` notices when something does not."""

import dataclasses
import sys

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from tests.tflite_export.graphs import Builder, small_network
from tflite_export import flatbuffer, runtime
from tflite_export.verify import KERAS, OUTPUTS, verify

pytestmark = [pytest.mark.once, pytest.mark.runtime]

IMAGES = 40


def assert_exact(graph, images, *, kernels=runtime.XNNPACK, codes=10):
    """No wrong code, in the kernels that we think, on outputs that are not all alike."""
    content = flatbuffer.write(graph)
    result = verify(graph, content, images)
    assert result.wrong == 0, str(result)
    sets = runtime.kernel_sets(content)
    assert set(sets) == {op.output for op in graph}
    if kernels:
        assert set(sets.values()) == {kernels}
    inputs = images if isinstance(images, dict) else {graph.inputs[0]: images}
    values = reference.run(graph, inputs)
    assert all(len(np.unique(values[name])) >= codes for name in graph.outputs)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("window", "strides", "dilation"),
    [
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (1, 1)),
        ((3, 3), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1)),
        ((5, 2), (2, 1), (1, 1)),
        ((4, 4), (3, 3), (1, 1)),
        ((3, 3), (1, 1), (2, 2)),
        ((3, 2), (1, 1), (1, 3)),
    ],
)
def test_convolutions_match_code_for_code(window, strides, dilation, padding, groups):
    b = Builder()
    x = b.input(1, 9, 8, 6)
    shape = (1, *_sizes((9, 8), window, strides, dilation, padding), 12)
    fields = {"strides": strides, "dilation": dilation, "padding": padding}
    y = b.product(ir.Conv2D, x, (*window, 6 // groups, 12), shape, **fields)
    assert_exact(b.graph(y), b.codes((IMAGES, 9, 8, 6)))


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("window", "strides", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1)),
        ((5, 5), (1, 1), (1, 1)),
        ((2, 4), (2, 2), (1, 1)),
        ((3, 3), (1, 1), (2, 2)),
    ],
)
def test_depthwise_convolutions_match_code_for_code(window, strides, dilation, padding, multiplier):
    b = Builder()
    x = b.input(1, 9, 10, 5)
    shape = (1, *_sizes((9, 10), window, strides, dilation, padding), 5 * multiplier)
    fields = {"strides": strides, "dilation": dilation, "padding": padding}
    y = b.product(ir.DepthwiseConv2D, x, (*window, 5, multiplier), shape, **fields)
    assert_exact(b.graph(y), b.codes((IMAGES, 9, 10, 5)))


def _sizes(sizes, window, strides, dilation, padding):
    if padding == "SAME":
        return [-(-n // s) for n, s in zip(sizes, strides, strict=True)]
    extents = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    return [(n - e) // s + 1 for n, e, s in zip(sizes, extents, strides, strict=True)]


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("lead", [(1,), (1, 3, 5)])
@pytest.mark.parametrize("channels", [2, 6, 34])
def test_fully_connected_layers_match_code_for_code(storage, lead, channels):
    b = Builder()
    x = b.input(*lead, channels)
    codes = (-8, 8) if storage == "int4" else (-127, 128)
    y = b.product(ir.FullyConnected, x, (channels, 7), (*lead, 7), codes=codes, storage=storage)
    assert_exact(b.graph(y), b.codes((IMAGES, *lead[1:], channels)))


def test_int4_with_an_odd_number_of_inputs_leaves_xnnpack():
    b = Builder()
    x = b.input(1, 5)
    y = b.product(ir.FullyConnected, x, (5, 7), (1, 7), codes=(-8, 8), storage="int4")
    assert runtime.kernel_sets(flatbuffer.write(b.graph(y))) == {y: runtime.BUILT_IN}


@pytest.mark.parametrize("kind", [ir.Conv2D, ir.DepthwiseConv2D])
def test_int4_convolutions_run_in_built_in_kernels_within_one_lsb(kind):
    b = Builder()
    x = b.input(1, 7, 7, 6)
    kernel = (3, 3, 6, 6) if kind is ir.Conv2D else (3, 3, 6, 1)
    y = b.product(kind, x, kernel, (1, 5, 5, 6), codes=(-7, 8), storage="int4")
    content = flatbuffer.write(b.graph(y))
    assert runtime.kernel_sets(content) == {y: runtime.BUILT_IN}
    # Built-in kernels round twice in fixed point, the reference once in float32.
    wrong, compared, max_lsb = verify(b.graph(y), content, b.codes((IMAGES, 7, 7, 6))).by_tensor[y]
    assert max_lsb <= 1
    assert wrong < compared / 5


@pytest.mark.parametrize("kind", ["conv", "depthwise", "dense"])
@pytest.mark.parametrize(
    ("activation", "scale", "zero_point", "lo", "hi"),
    [
        ("relu", 0.3, -20, -20, 127),
        ("relu6", 6 / 15, -128, -128, -113),
        ("relu6", 6 / 3, -128, -128, -125),
        ("relu6", 6 / 1.5, 1, 1, 2),  # 1 + 1.5 is a tie: half to even
        ("relu_n1_to_1", 1 / 7, 0, -7, 7),
        ("relu_n1_to_1", 1.0, 0, -1, 1),
        ("relu_n1_to_1", 1 / 2.5, 1, -2, 4),
    ],
)
def test_fused_clips_match_code_for_code(kind, activation, scale, zero_point, lo, hi):
    b = Builder()
    x = b.input(1, 4, 4, 6, scale=0.2)
    fields = {"scale": scale, "zero_point": zero_point, "activation": activation}
    if kind == "conv":
        y = b.product(ir.Conv2D, x, (1, 1, 6, 6), (1, 4, 4, 6), **fields)
    elif kind == "depthwise":
        y = b.product(ir.DepthwiseConv2D, x, (2, 2, 6, 1), (1, 3, 3, 6), **fields)
    else:
        y = b.product(ir.FullyConnected, x, (6, 6), (1, 4, 4, 6), **fields)
    graph, images = b.graph(y), b.codes((IMAGES, 4, 4, 6))
    assert_exact(graph, images, codes=2)
    found = reference.run(graph, {x: images})[y]
    assert (found.min(), found.max()) == (lo, hi)


ACTIVATIONS = ["none", "relu", "relu6", "relu_n1_to_1"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("scale_a", "scale_b", "scale_out"),
    [
        (0.05, 0.031, 0.06),
        (0.05, 0.05, 0.05),
        (1.0, 2.0**-10, 1.0),
        (2.0**-10, 2.0**-10, 1.0),
        (0.1, 0.1 * 0.99 * 256, 0.1),
        (0.007, 0.9, 0.11),
    ],
)
def test_additions_match_code_for_code(scale_a, scale_b, scale_out, activation):
    b = Builder()
    x = b.input(1, 16, 16, 5, scale=scale_a, zero_point=-7)
    y = b.input(1, 16, 16, 5, name="y", scale=scale_b, zero_point=31)
    z = b.op(
        ir.Add, x, y, shape=(1, 16, 16, 5), scale=scale_out, zero_point=-3, activation=activation
    )
    graph = b.graph(z)
    content = flatbuffer.write(graph)
    images = {x: b.codes((IMAGES, 16, 16, 5)), y: b.codes((IMAGES, 16, 16, 5))}
    assert verify(graph, content, images).wrong == 0
    assert runtime.kernel_sets(content) == {z: runtime.XNNPACK}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero_point", [-128, 0, 3])
@pytest.mark.parametrize(
    ("scale", "scale_out"),
    [(0.05, 6 / 15), (0.05, 1 / 7), (0.3, 0.011), (1.0, 1.0), (0.002, 1.0), (2.0, 0.008)],
)
def test_copies_on_other_grids_match_code_for_code(scale, scale_out, zero_point, activation):
    b = Builder()
    x = b.input(1, 16, 16, 1, scale=scale, zero_point=-9)
    y = b.copy(x, scale=scale_out, zero_point=zero_point, activation=activation)
    every_code = np.arange(-128, 128, dtype=np.int8).reshape(1, 16, 16, 1)
    assert_exact(b.graph(y), every_code, codes=1)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("pool", "strides"), [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((3, 2), (1, 2))]
)
def test_pools_match_code_for_code(pool, strides, padding):
    b = Builder()
    x = b.input(1, 9, 8, 3)
    shape = (1, *_sizes((9, 8), pool, strides, (1, 1), padding), 3)
    fields = {"pool": pool, "strides": strides, "padding": padding}
    y = b.same_grid(ir.MaxPool2D, x, shape=shape, **fields)
    z = b.same_grid(ir.AveragePool2D, x, shape=shape, **fields)
    graph = b.graph(y, z)
    assert_exact(graph, b.codes((IMAGES, 9, 8, 3)), kernels=None)
    sets = runtime.kernel_sets(flatbuffer.write(graph))
    assert sets == {y: runtime.XNNPACK, z: runtime.BUILT_IN}


def test_moves_of_codes_match_code_for_code():
    b = Builder()
    x = b.input(1, 5, 3, 4, zero_point=-17)
    paddings = ((0, 0), (1, 2), (0, 3), (0, 0))
    y = b.same_grid(ir.Pad, x, shape=(1, 8, 6, 4), paddings=paddings)
    z = b.same_grid(ir.Reshape, y, shape=(1, 8, 24))
    w = b.same_grid(ir.Concatenate, z, z, shape=(1, 16, 24), axis=1)
    v = b.same_grid(ir.Concatenate, w, w, shape=(1, 16, 48), axis=-1)
    assert_exact(b.graph(v), b.codes((IMAGES, 5, 3, 4)))


@pytest.mark.parametrize("classes", [2, 10, 257])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_softmax_matches_code_for_code(scale, classes):
    b = Builder()
    x = b.input(1, classes, scale=scale)
    y = b.op(ir.Softmax, x, shape=(1, classes), scale=1 / 256, zero_point=-128)
    assert_exact(b.graph(y), b.codes((500, classes)), kernels=runtime.BUILT_IN, codes=2)


@pytest.mark.parametrize("scale", np.geomspace(1e-3, 1.0, 24).tolist())
@pytest.mark.parametrize("zero_point", [0, -31])
def test_the_logistic_of_every_code_matches_code_for_code(scale, zero_point):
    b = Builder()
    x = b.input(1, 256, scale=scale, zero_point=zero_point)
    y = b.op(ir.Logistic, x, shape=(1, 256), scale=1 / 256, zero_point=-128)
    every = np.arange(-128, 128, dtype=np.int8)[None]
    assert_exact(b.graph(y), every, codes=2)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("unit", [2.0**-15, 0.0013, 1 / 255, 0.031, 0.5, 1.0, 7.3, 250.0])
def test_the_product_of_any_two_codes_matches_code_for_code(unit, activation):
    """All 65,536 pairs; a row of each first code, repeated along the second axis."""
    b = Builder()
    x = b.input(1, 256, 1, scale=0.11, zero_point=-128)
    y = b.input(1, 256, 256, name="y", scale=0.07, zero_point=5)
    scale = 0.11 * 0.07 / unit
    made = b.op(ir.Multiply, x, y, shape=(1, 256, 256), scale=scale, activation=activation)
    every = np.arange(-128, 128, dtype=np.int8)
    pairs = {x: every[None, :, None], y: np.tile(every, (1, 256, 1))}
    assert_exact(b.graph(made), pairs, codes=2)


@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 3), (1 / 127.5, -128), (0.0471, 0)])
def test_quantized_floats_match_code_for_code(scale, zero_point):
    b = Builder()
    x = b.input(1, 300, scale=None, dtype="float32")
    y = b.op(ir.Quantize, x, shape=(1, 300), scale=scale, zero_point=zero_point)
    ties = ((np.arange(-150, 150) + 0.5) * np.float32(scale)).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    random = b.random.normal(0, 70 * scale, (200, 300)).astype(np.float32)
    assert_exact(b.graph(y), np.concatenate([ties[None], *(n[None] for n in near), random]))


@pytest.mark.parametrize(
    ("source", "target", "zero_point"), [("uint8", "int8", 128), ("int8", "uint8", -128)]
)
def test_border_conversions_match_code_for_code(source, target, zero_point):
    b = Builder()
    x = b.input(1, 256, scale=0.3, zero_point=zero_point, dtype=source)
    shift = -128 if target == "int8" else 128
    y = b.op(ir.Quantize, x, shape=(1, 256), scale=0.3, zero_point=zero_point + shift, dtype=target)
    z = b.op(ir.Dequantize, y, shape=(1, 256), scale=None, dtype="float32")
    every_code = np.arange(256, dtype=np.uint8).view(source)[None]
    assert_exact(b.graph(y, z), every_code, kernels=None)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_networks_match_code_for_code(storage, seed):
    graph, images = small_network(storage, seed)
    assert_exact(graph, images, kernels=None)


def test_kernel_sets_end_at_the_borders_of_a_partition():
    graph, _ = small_network()
    sets = runtime.kernel_sets(flatbuffer.write(graph))
    # Built-in operations lie before, between and behind the delegated ones.
    built_in = {
        op.output for op in graph if isinstance(op, ir.Quantize | ir.AveragePool2D | ir.Softmax)
    }
    assert len(built_in) == 4
    assert {name for name, kernels in sets.items() if kernels == runtime.BUILT_IN} == built_in


def test_batches_of_the_file_match_too():
    b = Builder()
    x = b.input(3, 5, 5, 2)
    y = b.product(ir.Conv2D, x, (2, 2, 2, 4), (3, 4, 4, 4))
    assert_exact(b.graph(y), b.codes((21, 5, 5, 2)))


def test_every_tensor_and_the_shipped_outputs_are_counted():
    graph, images = small_network()
    result = verify(graph, flatbuffer.write(graph), images)
    sizes = {name: int(np.prod(graph.tensors[name].shape)) for name in result.by_tensor}
    assert set(result.by_tensor) == {op.output for op in graph}
    assert result.images == 9
    # The output counts twice: in the copy and in the file as shipped.
    assert result.compared == 9 * (sum(sizes.values()) + sizes["probabilities"])
    assert tuple(result.by_comparison[OUTPUTS]) == (0, 90, 0.0)


def test_one_flipped_weight_code_is_seen_where_it_sits():
    graph, images = small_network()
    content = flatbuffer.write(_with_flipped_code(graph, "pointwise"))
    result = verify(graph, content, images)
    assert result.wrong > 0
    wrong = [name for name, count in result.by_tensor.items() if count.wrong]
    assert wrong[0] == "pointwise"
    assert result.by_tensor["clipped"].wrong == 0
    assert "pointwise" in str(result)


def test_one_flipped_weight_code_in_the_bytes_is_seen():
    graph, images = small_network()
    content = flatbuffer.write(graph)
    (op,) = (op for op in graph if op.output == "pointwise")
    stored = op.kernel.T.tobytes()
    changed = bytes([stored[0] ^ 4]) + stored[1:]
    assert content.count(stored) == 1
    assert verify(graph, content.replace(stored, changed), images).by_tensor["pointwise"].wrong > 0


def _with_flipped_code(graph, name):
    def flipped(op):
        kernel = op.kernel.copy()
        kernel.flat[0] ^= 4
        return dataclasses.replace(op, kernel=kernel)

    ops = tuple(flipped(op) if op.output == name else op for op in graph)
    return dataclasses.replace(graph, ops=ops)


def test_keras_tensors_are_compared_by_name():
    graph, images = small_network()
    content = flatbuffer.write(graph)
    values = reference.run(graph, {"x": images})
    frozen = {name: values[name].astype(np.float32) for name in ("clipped", "pointwise")}
    same = verify(graph, content, images, frozen)
    assert same.by_comparison[KERAS].wrong == 0
    assert same.by_comparison[KERAS].compared == 2 * 9 * 6 * 5 * 8
    frozen["clipped"][8, 0, 0, 0] += 2  # in the second chunk
    result = verify(graph, content, images, frozen)
    assert tuple(result.counts[KERAS, "clipped"]) == (1, 9 * 6 * 5 * 8, 2.0)
    assert result.wrong == 1


def test_differences_of_reals_are_counted_in_units_of_their_scale():
    graph, images = small_network()
    values = reference.run(graph, {"x": images})
    moved = values["probabilities"] + np.float32(3 / 256)
    result = verify(graph, flatbuffer.write(graph), images, {"probabilities": moved})
    assert result.counts[KERAS, "probabilities"].max_lsb == pytest.approx(3)


def test_a_frozen_tensor_that_is_nan_counts_as_wrong():
    graph, images = small_network()
    frozen = {"clipped": np.full((9, 6, 5, 8), np.nan)}
    result = verify(graph, flatbuffer.write(graph), images, frozen)
    assert tuple(result.counts[KERAS, "clipped"]) == (9 * 240, 9 * 240, np.inf)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [({"lost": np.zeros(9)}, "no tensor lost"), ({"clipped": np.zeros((8, 6, 5, 8))}, "shape")],
)
def test_frozen_tensors_that_do_not_fit_are_refused(frozen, message):
    graph, images = small_network()
    with pytest.raises(ValueError, match=message):
        verify(graph, flatbuffer.write(graph), images, frozen)


def test_images_of_another_size_dtype_or_none_are_refused():
    graph, images = small_network()
    content = flatbuffer.write(graph)
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, 13, 11, 3\)"):
        verify(graph, content, images[:, :12])
    with pytest.raises(ValueError, match="Got float32"):
        verify(graph, content, images.astype(np.float32))
    with pytest.raises(ValueError, match="at least one"):
        verify(graph, content, images[:0])


def test_the_file_of_another_graph_is_refused():
    graph, images = small_network()
    b = Builder()
    x = b.input(1, 13, 11, 3, scale=1 / 127.5, zero_point=128, dtype="uint8")
    y = b.op(ir.Quantize, x, shape=(1, 13, 11, 3), scale=1 / 127.5, zero_point=0)
    with pytest.raises(ValueError, match="not written from this graph"):
        verify(graph, flatbuffer.write(b.graph(y)), images)


@pytest.mark.parametrize("size", [0, 3, 100, 3000])
def test_a_truncated_file_is_refused_in_words(size):
    graph, images = small_network()
    with pytest.raises(ValueError, match="LiteRT refuses"):
        verify(graph, flatbuffer.write(graph)[:size], images)


def test_the_runtime_refuses_inputs_that_are_no_whole_batches():
    b = Builder()
    x = b.input(3, 4)
    y = b.product(ir.FullyConnected, x, (4, 2), (3, 2))
    content = flatbuffer.write(b.graph(y))
    with pytest.raises(ValueError, match="times any whole number"):
        runtime.run(content, {x: b.codes((4, 4))})
    with pytest.raises(ValueError, match="inputs are"):
        runtime.run(content, {"y": b.codes((3, 4))})


@pytest.mark.parametrize("counts", [(3, 6), (6, 3)])
def test_the_runtime_refuses_inputs_of_unequal_sample_counts(counts):
    b = Builder()
    first, second = b.input(3, 4, name="first"), b.input(3, 4, name="second")
    y = b.op(ir.Add, first, second, shape=(3, 4), scale=0.05)
    content = flatbuffer.write(b.graph(y))
    # Each is whole batches of 3; the file alone would drop the rest of the longer one.
    inputs = {name: b.codes((n, 4)) for name, n in zip((first, second), counts, strict=True)}
    with pytest.raises(ValueError, match="same number of samples"):
        runtime.run(content, inputs)


def test_built_in_kernels_and_threads_can_be_asked_for():
    graph, images = small_network()
    content = flatbuffer.write(graph, all_outputs=True)
    default = runtime.run(content, {"x": images})
    threaded = runtime.run(content, {"x": images}, threads=2)
    builtin = runtime.run(content, {"x": images}, builtin_kernels=True)
    assert all((default[name] == threaded[name]).all() for name in default)
    # They round differently, so 0 differences would mean that XNNPACK ran after all.
    assert any((default[name] != builtin[name]).any() for name in default)


def test_latency_is_a_positive_number_of_milliseconds():
    graph, _ = small_network()
    assert 0 < runtime.median_latency(flatbuffer.write(graph), runs=5) < 1000


def test_without_litert_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"pip install keras-lowbit\[tflite\]"):
        runtime.run(b"", {})
