"""The arithmetic in `keras.ops` against numbers worked by hand and against the definition."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.integer import arithmetic, frozen, reference
from keras_lowbit.integer import graph as ir

SIGNED = np.arange(-128, 128).astype(np.int8)


def one_op(op, *tensors):
    """A graph of one operation on `tensors[:-1]`, giving `tensors[-1]`."""
    inputs = tuple(t.name for t in tensors[:-1])
    return ir.Graph({t.name: t for t in tensors}, (op,), inputs, (op.output,))


def outputs(graph, *inputs, **compile_arguments):
    """Codes of the graph's last output: by the definition, eagerly, and compiled."""
    feed = dict(zip(graph.inputs, inputs, strict=True))
    wanted = reference.run(graph, feed)[graph.outputs[-1]]
    model = frozen.build(graph)
    arrays = [feed[name] for name in graph.inputs]
    arrays = arrays[0] if len(arrays) == 1 else arrays
    eager = ops.convert_to_numpy(model(arrays))
    if keras.backend.backend() == "tensorflow":
        compile_arguments.setdefault("jit_compile", True)
    model.compile(**compile_arguments)
    return wanted, eager, model.predict(arrays, verbose=0)


def assert_all_equal(wanted, eager, compiled):
    np.testing.assert_array_equal(eager, wanted)
    np.testing.assert_array_equal(compiled, wanted)


def dense_graph(kernel, bias, scales, *, zero_point=0, zero_point_out=0, scale_out=1.0):
    return one_op(
        ir.FullyConnected(("x",), "y", kernel=kernel, kernel_scale=scales, bias=bias),
        ir.Tensor("x", (1, kernel.shape[0]), scale=1.0, zero_point=zero_point),
        ir.Tensor("y", (1, kernel.shape[1]), scale=scale_out, zero_point=zero_point_out),
    )


def test_a_product_rounds_half_to_even_before_the_zero_point_is_added():
    # 3 / 2 -> 2, 5 / 2 -> 2, -3 / 2 -> -2; then + 1. Adding 1 first gives 2, 4, 0 instead.
    graph = dense_graph(
        np.ones((1, 1), np.int8), np.zeros(1, np.int32), np.float32([0.5]), zero_point_out=1
    )
    wanted, eager, compiled = outputs(graph, np.int8([[3], [5], [-3]]))
    assert wanted.ravel().tolist() == [3, 3, -1]
    assert_all_equal(wanted, eager, compiled)


def test_the_float32_rounding_of_a_product_is_kept_when_compiled():
    # sum * m rounds to k + 1/2 in float32 although the real product is beside it, so any fused
    # or wider arithmetic shows. Zero kernels leave the sums to the biases.
    rng = np.random.default_rng(0)
    bias = rng.integers(2**22, 2**24, 4096).astype(np.int32)
    scales = ((rng.integers(-100, 100, 4096) + 0.5) / bias).astype(np.float32)
    bias, scales = np.sign(scales).astype(np.int32) * bias, np.abs(scales)
    real = np.rint(bias.astype(np.float64) * scales.astype(np.float64))
    stepwise = np.rint(bias.astype(np.float32) * scales)
    assert (real != stepwise).sum() > 500
    graph = dense_graph(np.zeros((1, 4096), np.int8), bias, scales, zero_point_out=3)
    wanted, eager, compiled = outputs(graph, np.zeros((2, 1), np.int8))
    np.testing.assert_array_equal(wanted[0], stepwise + 3)
    assert_all_equal(wanted, eager, compiled)


def test_sums_above_2_to_24_round_to_float32_as_in_the_reference():
    rng = np.random.default_rng(1)
    bias = rng.integers(-(2**30), 2**30, 4096).astype(np.int32)
    scales = np.float32(100.0) / np.abs(bias).astype(np.float32)
    graph = dense_graph(np.full((1, 4096), 127, np.int8), bias, scales)
    assert_all_equal(*outputs(graph, SIGNED[:, None]))


# With 255 everywhere and these kernels, sums pass 2^24 while `bias` brings them back to a few
# hundred: a sum that is off by 1 moves a code at a multiplier of 1.
def far_sums(rng, kernel, summed):
    total = 255 * kernel.astype(np.int64).sum(tuple(range(summed))).reshape(-1)
    assert total.max() > 2**24
    return (-total).astype(np.int32), np.ones(total.size, np.float32)


def nearly_full(rng, shape, lowered=4):
    """Codes 127 with a few 126 in each sample."""
    x = np.full((shape[0], np.prod(shape[1:])), 127, np.int8)
    for row in x:
        row[rng.integers(0, row.size, lowered)] = 126
    return x.reshape(shape)


def test_a_convolution_whose_sums_pass_2_to_24_is_exact():
    rng = np.random.default_rng(2)
    kernel = rng.integers(60, 128, (3, 3, 256, 5)).astype(np.int8)
    bias, scales = far_sums(rng, kernel, 3)
    op = ir.Conv2D(("x",), "y", kernel=kernel, kernel_scale=scales, bias=bias, padding="VALID")
    x = ir.Tensor("x", (1, 5, 4, 256), scale=1.0, zero_point=-128)
    assert arithmetic.choose_split(op, x) == arithmetic.Split(nibbles=True)
    graph = one_op(op, x, ir.Tensor("y", (1, 3, 2, 5), scale=4.0))
    codes = nearly_full(rng, (3, 5, 4, 256))
    wanted, eager, compiled = outputs(graph, codes)
    assert np.unique(wanted).size > 20
    assert_all_equal(wanted, eager, compiled)
    # The same sums without the split are wrong, so the split is what makes them right.
    whole = arithmetic.run(
        op, [codes], [x], graph.tensors["y"], op.constants | {"multiplier": scales / 4}
    )
    assert (ops.convert_to_numpy(whole) != wanted).any()


def test_a_grouped_convolution_whose_sums_pass_2_to_24_is_exact():
    rng = np.random.default_rng(3)
    kernel = rng.integers(100, 128, (3, 3, 80, 4)).astype(np.int8)
    bias, scales = far_sums(rng, kernel, 3)
    op = ir.Conv2D(("x",), "y", kernel=kernel, kernel_scale=scales, bias=bias)
    graph = one_op(
        op,
        ir.Tensor("x", (1, 3, 3, 160), scale=1.0, zero_point=-128),
        ir.Tensor("y", (1, 1, 1, 4), scale=4.0),
    )
    assert_all_equal(*outputs(graph, nearly_full(rng, (8, 3, 3, 160))))


def test_a_dense_layer_too_long_for_nibbles_is_dealt_to_slabs():
    rng = np.random.default_rng(4)
    kernel = rng.integers(80, 128, (20001, 3)).astype(np.int8)
    bias, scales = far_sums(rng, kernel, 1)
    graph = dense_graph(kernel, bias, scales, zero_point=-128, scale_out=4.0)
    split = arithmetic.choose_split(graph.ops[0], graph.tensors["x"])
    assert split.nibbles
    assert split.slabs > 1
    assert_all_equal(*outputs(graph, nearly_full(rng, (4, 20001))))


def test_a_large_depthwise_mean_is_exact():
    rng = np.random.default_rng(5)
    kernel = np.full((25, 25, 2, 1), 127, np.int8)
    bias, scales = far_sums(rng, kernel, 2)
    op = ir.DepthwiseConv2D(("x",), "y", kernel=kernel, kernel_scale=scales, bias=bias)
    graph = one_op(
        op,
        ir.Tensor("x", (1, 25, 25, 2), scale=1.0, zero_point=-128),
        ir.Tensor("y", (1, 1, 1, 2), scale=16.0),
    )
    assert_all_equal(*outputs(graph, nearly_full(rng, (8, 25, 25, 2), lowered=7)))


@pytest.mark.parametrize("split", [(False, 1), (True, 1), (False, 3), (True, 2)])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(ir.Conv2D, (3, 2, 5, 4)), (ir.DepthwiseConv2D, (3, 3, 4, 2)), (ir.FullyConnected, (7, 3))],
)
def test_the_parts_of_a_kernel_add_up_to_it(kind, shape, split):
    kernel = np.resize(SIGNED, shape)
    parts = arithmetic.kernel_parts(kind, kernel, arithmetic.Split(*split))
    assert len(parts) == (1 + split[0]) * split[1]
    total = sum(weight * ops.convert_to_numpy(part) for weight, part in parts)
    np.testing.assert_array_equal(total, kernel)


def test_every_int8_code_is_sixteen_times_one_nibble_plus_another():
    (_, high), (_, low) = arithmetic.kernel_parts(
        ir.FullyConnected, SIGNED[:, None], arithmetic.Split(nibbles=True)
    )
    for digit in (high, low):
        assert np.abs(ops.convert_to_numpy(digit)).max() == 8


def test_a_sum_that_could_leave_int32_is_refused_by_name():
    kernel, bias = np.full((2, 1), 127, np.int8), np.int32([2**31 - 1000])
    with pytest.raises(ValueError, match="fully_connected y: a sum can reach"):
        frozen.build(dense_graph(kernel, bias, np.float32([1e-9])))


@pytest.mark.parametrize("scales", [(0.02, 0.03, 0.045), (1.0, 2.0**-10, 1.0), (255.9, 1.0, 1.0)])
def test_an_addition_equals_the_reference_for_all_pairs_of_codes(scales):
    a, b = (c.astype(np.int8) for c in np.meshgrid(SIGNED, SIGNED))
    for zero_points in ((0, 0, 0), (-128, 127, 5), (127, -128, -128)):
        tensors = [
            ir.Tensor(name, (1, 256), scale=scale, zero_point=zero_point)
            for name, scale, zero_point in zip("aby", scales, zero_points, strict=True)
        ]
        assert_all_equal(*outputs(one_op(ir.Add(("a", "b"), "y"), *tensors), a, b))


def test_an_addition_clips_and_refuses_ratios_that_the_runtime_does_not_add():
    for scale in (1.0, 0.3, 2.0, 1 / 1000, 250.0):
        graph = one_op(
            ir.Add(("x", "x"), "y", activation="relu6"),
            ir.Tensor("x", (1, 1), scale=scale, zero_point=-7),
            ir.Tensor("y", (1, 1), scale=6 / 15, zero_point=-128),
        )
        if scale == 250.0:
            with pytest.raises(ValueError, match=r"2\^8"):
                outputs(graph, SIGNED[:, None])
        else:
            assert_all_equal(*outputs(graph, SIGNED[:, None]))


def test_an_average_pool_rounds_halves_away_from_zero_and_leaves_padding_out():
    # SAME on 3 x 3, window 2, stride 2: windows of 4, 2, 2 and 1 codes.
    x = np.int8([[1, 2, 3], [-3, 2, -6], [-4, -5, -7]]).reshape(1, 3, 3, 1)
    # means 2/4 -> 1, -3/2 -> -2, -9/2 -> -5, -7
    grid = {"scale": 0.5, "zero_point": 9}
    graph = one_op(
        ir.AveragePool2D(("x",), "y", padding="SAME"),
        ir.Tensor("x", (1, 3, 3, 1), **grid),
        ir.Tensor("y", (1, 2, 2, 1), **grid),
    )
    wanted, eager, compiled = outputs(graph, x)
    assert wanted.ravel().tolist() == [1, -2, -5, -7]
    assert_all_equal(wanted, eager, compiled)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("pool", "strides"), [((3, 2), (2, 1)), ((2, 4), (3, 3)), ((5, 5), (1, 1))]
)
@pytest.mark.parametrize("kind", [ir.AveragePool2D, ir.MaxPool2D])
def test_pools_equal_the_reference(kind, pool, strides, padding):
    x = np.random.default_rng(6).integers(-128, 128, (2, 9, 7, 3)).astype(np.int8)
    tensors = ir.Tensor("x", (1, 9, 7, 3), scale=1.0), ir.Tensor("y", (1, 1, 1, 3), scale=1.0)
    graph = one_op(kind(("x",), "y", pool=pool, strides=strides, padding=padding), *tensors)
    shape = reference.run(graph, {"x": x})["y"].shape
    tensors = tensors[0], ir.Tensor("y", (1, *shape[1:]), scale=1.0)
    assert_all_equal(*outputs(one_op(graph.ops[0], *tensors), x))


def softmax_graph(classes, scale):
    return one_op(
        ir.Softmax(("x",), "y"),
        ir.Tensor("x", (1, classes), scale=scale),
        ir.Tensor("y", (1, classes), scale=1 / 256, zero_point=-128),
    )


def test_softmax_of_equal_codes_is_worked_by_hand():
    # 256 / 2 = 128 -> 0; 256 / 512 = 1/2 -> 1 -> -127; 256 / 1 -> 128 -> clipped to 127.
    for classes, code in ((2, 0), (512, -127), (1, 127)):
        wanted, eager, compiled = outputs(
            softmax_graph(classes, 0.1), np.full((1, classes), 5, "i1")
        )
        assert set(wanted.ravel().tolist()) == {code}
        assert_all_equal(wanted, eager, compiled)


@pytest.mark.parametrize(("classes", "scale"), [(10, 0.11), (101, 0.02), (3, 1e-6), (5, 9.0)])
def test_softmax_equals_the_reference(classes, scale):
    x = np.random.default_rng(7).integers(-128, 128, (20, classes)).astype(np.int8)
    assert_all_equal(*outputs(softmax_graph(classes, scale), x))


@pytest.mark.parametrize(("scale", "zero_point"), [(0.05, 0), (1e-6, -128), (9.0, 3)])
def test_the_logistic_of_every_code_equals_the_reference(scale, zero_point):
    graph = one_op(
        ir.Logistic(("x",), "y"),
        ir.Tensor("x", (1, 256), scale=scale, zero_point=zero_point),
        ir.Tensor("y", (1, 256), scale=1 / 256, zero_point=-128),
    )
    assert_all_equal(*outputs(graph, np.arange(-128, 128, dtype=np.int8)[None]))


@pytest.mark.parametrize("unit", [2.0**-8, 0.0041, 0.5, 3.0])
def test_the_product_of_any_two_codes_equals_the_reference(unit):
    """In every row the first code with each of the 256, halves among the results."""
    graph = one_op(
        ir.Multiply(("a", "b"), "y"),
        ir.Tensor("a", (1, 256, 1), scale=0.5, zero_point=-128),
        ir.Tensor("b", (1, 256, 256), scale=0.25, zero_point=5),
        ir.Tensor("y", (1, 256, 256), scale=0.125 / unit, zero_point=-9),
    )
    pairs = SIGNED[None, :, None], np.tile(SIGNED, (1, 256, 1))
    assert_all_equal(*outputs(graph, *pairs))


def test_softmax_equals_the_reference_where_another_order_of_sums_does_not():
    x = np.random.default_rng(8).integers(-128, 128, (40000, 24)).astype(np.int8)
    wanted, eager, compiled = outputs(softmax_graph(24, 0.015), x)
    backwards = reference.run(softmax_graph(24, 0.015), {"x": x[:, ::-1]})["y"][:, ::-1]
    assert (backwards != wanted).any()
    assert_all_equal(wanted, eager, compiled)


@pytest.mark.parametrize("scale", [0.1, 1 / 127.5, 0.0123])
def test_the_input_is_multiplied_by_the_reciprocal_of_the_scale(scale):
    # Reals beside a tie, where a division gives other codes.
    scale = np.float32(scale)
    x = (np.arange(-140, 140) + 0.5).astype(np.float32) * scale
    x = np.concatenate([x, np.nextafter(x, np.float32(-9)), np.nextafter(x, np.float32(9))])[
        :, None
    ]
    graph = one_op(
        ir.Quantize(("x",), "y"),
        ir.Tensor("x", (1, 1), "float32"),
        ir.Tensor("y", (1, 1), scale=float(scale), zero_point=1),
    )
    assert (np.rint(x / scale) != np.rint(x * (1 / scale))).any()
    assert_all_equal(*outputs(graph, x))


def test_codes_come_back_to_reals_by_one_multiplication():
    graph = one_op(
        ir.Dequantize(("x",), "y"),
        ir.Tensor("x", (1, 1), scale=0.0123, zero_point=-7),
        ir.Tensor("y", (1, 1), "float32"),
    )
    wanted, eager, compiled = outputs(graph, SIGNED[:, None])
    assert wanted[0, 0] == np.float32(-121) * np.float32(0.0123)
    assert_all_equal(wanted, eager, compiled)
