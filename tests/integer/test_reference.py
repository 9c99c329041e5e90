"""The reference, operation by operation, by numbers worked by hand."""

import numpy as np
import pytest

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference

pytestmark = pytest.mark.once


def compute(op_type, x, out, *, grid=(1.0, 0, "int8"), out_grid=(1.0, 0, "int8"), **fields):
    """Codes of one operation on `x`; `out` is the output's shape without the samples."""
    x = np.asarray(x, grid[2])
    tensors = {
        "x": ir.Tensor("x", (1, *x.shape[1:]), grid[2], grid[0], grid[1]),
        "y": ir.Tensor("y", (1, *out), out_grid[2], out_grid[0], out_grid[1]),
    }
    graph = ir.Graph(tensors, (op_type(("x",), "y", **fields),), ("x",), ("y",))
    y = reference.run(graph, {"x": x})["y"]
    assert y.dtype == out_grid[2]
    assert y.shape == (len(x), *out)
    return y


def product(kernel, scale=1.0, bias=0):
    kernel = np.asarray(kernel, np.int8)
    channels = kernel.shape[-1] if kernel.ndim != 4 else None
    return {
        "kernel": kernel,
        "kernel_scale": np.float32(scale) * np.ones(channels or 1, np.float32),
        "bias": np.full(channels or 1, bias, np.int32),
    }


def dense(x, kernel, scale=1.0, bias=0, **fields):
    fields = {**product(kernel, scale, bias), **fields}
    return compute(ir.FullyConnected, x, (np.shape(kernel)[-1],), **fields).tolist()


@pytest.mark.parametrize(
    ("code", "expected"), [(1, 0), (3, 2), (5, 2), (7, 4), (-1, 0), (-3, -2), (2, 1)]
)
def test_products_round_half_to_even(code, expected):
    assert dense([[code]], [[1]], scale=0.5) == [[expected]]


def test_products_take_the_zero_point_off_the_input_and_add_the_bias_first():
    # (10 - 3) * 2 + (20 - 3) * -1 + 5 = 2; 2 * (0.5 * 4 / 1) - 7 = -3
    y = dense(
        [[10, 20]],
        [[2], [-1]],
        scale=4.0,
        bias=5,
        grid=(0.5, 3, "int8"),
        out_grid=(1.0, -7, "int8"),
    )
    assert y == [[-3]]


def test_products_saturate_and_clip():
    assert dense([[100, 100], [-100, -100]], [[1], [1]]) == [[127], [-128]]
    assert dense([[100], [-100]], [[1]], activation="relu6") == [[6], [0]]
    assert dense([[100], [-100]], [[1]], activation="relu_n1_to_1") == [[1], [-1]]


def test_sums_are_rounded_to_float32_before_the_multiplication():
    # 2^24 + 1 is no float32; it becomes 2^24, and 2^24 * 2^-18 = 64. The bias brings it there,
    # one more than a float32 sum could tell.
    fields = {"bias": np.array([2**24], np.int32), "kernel_scale": np.array([2.0**-18], "f")}
    assert dense([[1]], [[1]], **fields) == [[64]]


def test_sums_above_float32_stay_exact():
    # 2100 products of 127 * 127 = 33.9 million > 2^24, then + 1 - 1 at the end.
    n = 2100
    x = np.full((1, n + 1), 127, np.int8)
    x[0, -1] = 1
    kernel = np.full((n + 1, 1), 127, np.int8)
    kernel[-1] = 1
    bias = np.array([-n * 127 * 127], np.int32)
    assert dense(x, kernel, bias=bias) == [[1]]


def test_a_sum_beyond_int32_is_refused():
    with pytest.raises(ValueError, match="y: a sum leaves int32"):
        dense([[127]], [[127]], bias=np.array([2**31 - 1], np.int32))


def test_same_padding_puts_the_odd_one_after():
    # 4 columns, window 3, stride 2: two places need 5 columns, so one pad, after.
    x = np.arange(1, 5).reshape(1, 1, 4, 1)
    fields = product(np.ones((1, 3, 1, 1))) | {"strides": (1, 2), "padding": "SAME"}
    y = compute(ir.Conv2D, x, (1, 2, 1), **fields)
    assert y.ravel().tolist() == [1 + 2 + 3, 3 + 4 + 0]


def test_same_padding_is_even_at_stride_one_and_fills_the_zero_point():
    x = np.array([11, 12, 13]).reshape(1, 1, 3, 1)
    fields = product(np.ones((1, 3, 1, 1))) | {"padding": "SAME"}
    y = compute(ir.Conv2D, x, (1, 3, 1), grid=(1.0, 10, "int8"), **fields)
    assert y.ravel().tolist() == [3, 6, 5]


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [(7, 3, 2, (1, 1)), (8, 3, 2, (0, 1)), (5, 2, 1, (0, 1)), (5, 5, 1, (2, 2)), (9, 1, 2, (0, 0))],
)
def test_same_padding_by_hand(size, window, stride, expected):
    assert reference.same_padding(size, window, stride, "SAME") == expected
    assert reference.same_padding(size, window, stride, "VALID") == (0, 0)
    with pytest.raises(ValueError, match="'full'"):
        reference.same_padding(size, window, stride, "full")


def test_dilation_skips_codes():
    x = np.array([1, 2, 3, 4, 5]).reshape(1, 1, 5, 1)
    fields = product(np.array([[[[1]], [[10]]]])) | {"dilation": (1, 3)}
    y = compute(ir.Conv2D, x, (1, 2, 1), **fields)
    assert y.ravel().tolist() == [1 + 40, 2 + 50]


def test_groups_see_only_their_own_channels():
    x = np.array([1, 2, 3, 4]).reshape(1, 1, 1, 4)
    kernel = np.array([[1, 1, 1, 0], [0, 1, 1, 1]]).reshape(1, 1, 2, 4)
    fields = {
        "kernel": kernel.astype(np.int8),
        "kernel_scale": np.ones(4, np.float32),
        "bias": np.zeros(4, np.int32),
    }
    y = compute(ir.Conv2D, x, (1, 1, 4), **fields)
    # Two outputs of the first group, [1, 2], then two of the second, [3, 4].
    assert y.ravel().tolist() == [1, 1 + 2, 3 + 4, 4]


def test_depthwise_outputs_of_one_channel_lie_side_by_side():
    x = np.array([1, 2]).reshape(1, 1, 1, 2)
    kernel = np.array([[1, 10], [3, 20]]).reshape(1, 1, 2, 2)
    fields = {
        "kernel": kernel.astype(np.int8),
        "kernel_scale": np.ones(4, np.float32),
        "bias": np.zeros(4, np.int32),
    }
    y = compute(ir.DepthwiseConv2D, x, (1, 1, 4), **fields)
    assert y.ravel().tolist() == [1, 10, 6, 40]


def two_inputs(op_type, a, b, out, grids, out_grid, **fields):
    a, b = (np.asarray(v, np.int8) for v in (a, b))
    tensors = {
        "a": ir.Tensor("a", (1, *a.shape[1:]), "int8", *grids[0]),
        "b": ir.Tensor("b", (1, *b.shape[1:]), "int8", *grids[1]),
        "y": ir.Tensor("y", (1, *out), "int8", *out_grid),
    }
    graph = ir.Graph(tensors, (op_type(("a", "b"), "y", **fields),), ("a", "b"), ("y",))
    return reference.run(graph, {"a": a, "b": b})["y"].tolist()


def test_additions_round_half_up():
    # (a + b) / 2: 1.5 -> 2, 0.5 -> 1, -0.5 -> 0, -1.5 -> -1
    y = two_inputs(ir.Add, [[3, 1, -1, -3]], [[0] * 4], (4,), [(1.0, 0)] * 2, (2.0, 0))
    assert y == [[2, 1, 0, -1]]


def test_additions_use_each_grid_and_clip():
    # (10 - 2) * 1 + (5 + 1) * 0.5 = 11; 11 / 0.25 = 44; 44 - 4 = 40
    grids, out = [(1.0, 2), (0.5, -1)], (0.25, -4)
    assert two_inputs(ir.Add, [[10]], [[5]], (1,), grids, out) == [[40]]
    # relu6 ends at 6 / 0.25 - 4 = 20
    assert two_inputs(ir.Add, [[10]], [[5]], (1,), grids, out, activation="relu6") == [[20]]


def test_max_pool_padding_never_wins():
    x = np.array([-100, -128, -128]).reshape(1, 1, 3, 1)
    fields = {"pool": (1, 2), "strides": (1, 2), "padding": "SAME"}
    assert compute(ir.MaxPool2D, x, (1, 2, 1), **fields).ravel().tolist() == [-100, -128]


@pytest.mark.parametrize(
    ("codes", "expected"), [([1, 2], 2), ([-1, -2], -2), ([1, 0], 1), ([3, 3], 3), ([-3, 0], -2)]
)
def test_average_pool_rounds_half_away_from_zero(codes, expected):
    x = np.array(codes).reshape(1, 1, 2, 1)
    fields = {"pool": (1, 2), "strides": (1, 2)}
    assert compute(ir.AveragePool2D, x, (1, 1, 1), **fields).item() == expected


def test_average_pool_does_not_count_padding():
    x = np.array([10, 20, 31]).reshape(1, 1, 3, 1)
    fields = {"pool": (1, 2), "strides": (1, 2), "padding": "SAME"}
    grid = (1.0, 50, "int8")
    y = compute(ir.AveragePool2D, x, (1, 2, 1), grid=grid, out_grid=grid, **fields)
    assert y.ravel().tolist() == [15, 31]


def test_pad_fills_the_zero_point():
    grid = (1.0, -9, "int8")
    y = compute(ir.Pad, [[5], [6]], (3,), grid=grid, out_grid=grid, paddings=((0, 0), (1, 1)))
    assert y.tolist() == [[-9, 5, -9], [-9, 6, -9]]


def test_reshape_and_concatenate_keep_codes():
    x = np.arange(12).reshape(2, 2, 3)
    assert compute(ir.Reshape, x, (6,)).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    grid = (1.0, 0)
    y = two_inputs(ir.Concatenate, [[1, 2]], [[3]], (3,), [grid, grid], grid, axis=-1)
    assert y == [[1, 2, 3]]


def test_softmax_counts_in_256ths():
    # scale log(2): powers 1, 1/2, 1/2 -> p = 1/2, 1/4, 1/4 -> 128, 64, 64, less 128
    grid, out_grid = (float(np.log(2)), 7, "int8"), (1 / 256, -128, "int8")
    y = compute(ir.Softmax, [[5, 4, 4]], (3,), grid=grid, out_grid=out_grid)
    assert y.tolist() == [[0, -64, -64]]
    # p = 1 would be code 128, which int8 does not have.
    y = compute(ir.Softmax, [[127, -128]], (2,), grid=grid, out_grid=out_grid)
    assert y.tolist() == [[127, -128]]


def test_products_of_two_tensors_round_half_to_even():
    # Unit 0.5 * 0.25 / 0.25 = 1/2 of (a - 1)(b + 2): 3 * 1, 3 * 5, -3 * 3 and 2 * 4 halves.
    grids = {"a": (0.5, 1), "b": (0.25, -2), "y": (0.25, 10)}
    tensors = {name: ir.Tensor(name, (1, 4), "int8", *grid) for name, grid in grids.items()}
    for activation, codes in (("none", [12, 18, 6, 14]), ("relu", [12, 18, 10, 14])):
        op = ir.Multiply(("a", "b"), "y", activation=activation)
        graph = ir.Graph(tensors, (op,), ("a", "b"), ("y",))
        fed = {"a": np.int8([[4, 4, -2, 3]]), "b": np.int8([[-1, 3, 1, 2]])}
        assert reference.run(graph, fed)["y"].tolist() == [codes]


def test_nearest_neighbours_are_repeated():
    grid = (0.5, 3, "int8")
    x = [[[[1], [2]], [[3], [4]]]]
    y = compute(ir.ResizeNearest, x, (4, 6, 1), grid=grid, out_grid=grid, factors=(2, 3))
    rows = [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert y[0, :, :, 0].tolist() == [rows[0], rows[0], rows[1], rows[1]]


def test_slices_and_transposes_move_codes():
    grid = (0.5, 3, "int8")
    x = [[[[1, 2, 3], [4, 5, 6]]]]
    y = compute(ir.Slice, x, (1, 1, 2), grid=grid, out_grid=grid, begin=(0, 0, 1, 1))
    assert y.tolist() == [[[[5, 6]]]]
    y = compute(ir.Transpose, x, (3, 1, 2), grid=grid, out_grid=grid, order=(0, 3, 1, 2))
    assert y.tolist() == [[[[1, 4]], [[2, 5]], [[3, 6]]]]


def test_products_repeat_axes_of_one():
    tensors = {
        "a": ir.Tensor("a", (1, 2, 2, 2), "int8", 1.0, 0),
        "b": ir.Tensor("b", (1, 1, 1, 2), "int8", 1.0, 0),
        "y": ir.Tensor("y", (1, 2, 2, 2), "int8", 1.0, 0),
    }
    graph = ir.Graph(tensors, (ir.Multiply(("a", "b"), "y"),), ("a", "b"), ("y",))
    a = np.arange(8, dtype=np.int8).reshape(1, 2, 2, 2)
    y = reference.run(graph, {"a": a, "b": np.int8([[[[2, -3]]]])})["y"]
    np.testing.assert_array_equal(y, a * [2, -3])


def test_the_logistic_counts_in_256ths():
    # scale log(3): x = 0, log 3, -log 3 -> 1/2, 3/4, 1/4 -> 128, 192, 64, less 128
    grid, out_grid = (float(np.log(3)), 7, "int8"), (1 / 256, -128, "int8")
    y = compute(ir.Logistic, [[7, 8, 6, 127, -128]], (5,), grid=grid, out_grid=out_grid)
    assert y.tolist() == [[0, 64, -64, 127, -128]]


def test_floats_are_quantized_half_to_even():
    x = np.array([[0.25, 0.75, 1.25, -0.25, 1e9, -1e9]], np.float32)
    y = compute(ir.Quantize, x, (6,), grid=(None, 0, "float32"), out_grid=(0.5, 10, "int8"))
    assert y.tolist() == [[10, 12, 12, 10, 127, -128]]


def test_pixels_move_between_uint8_and_int8_by_128():
    grid, out_grid = (0.3, 128, "uint8"), (0.3, 0, "int8")
    y = compute(ir.Quantize, [[0, 128, 255]], (3,), grid=grid, out_grid=out_grid)
    assert y.tolist() == [[-128, 0, 127]]
    y = compute(ir.Quantize, [[-128, 0, 127]], (3,), grid=out_grid, out_grid=grid)
    assert y.tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("out_grid", [(0.3, 1, "int8"), (0.4, 0, "int8"), (0.3, 128, "uint8")])
def test_quantize_between_other_grids_is_refused(out_grid):
    with pytest.raises(ValueError, match="DepthwiseConv2D of ones"):
        compute(ir.Quantize, [[0]], (1,), grid=(0.3, 128, "uint8"), out_grid=out_grid)


def test_dequantize_gives_reals():
    out_grid = (None, 0, "float32")
    y = compute(ir.Dequantize, [[-128, 3]], (2,), grid=(0.5, 3, "int8"), out_grid=out_grid)
    assert y.tolist() == [[-65.5, 0.0]]


def test_inputs_that_do_not_fit_are_refused():
    tensors = {n: ir.Tensor(n, (1, 2), scale=1.0) for n in ("a", "b", "y")}
    graph = ir.Graph(tensors, (ir.Add(("a", "b"), "y"),), ("a", "b"), ("y",))
    codes = np.zeros((3, 2), np.int8)
    with pytest.raises(ValueError, match=r"inputs are \['a', 'b'\]\. Got \['a'\]"):
        reference.run(graph, {"a": codes})
    with pytest.raises(ValueError, match=r"Input b must be int8 of shape \(N, 2\)"):
        reference.run(graph, {"a": codes, "b": codes[:, :1]})
    with pytest.raises(ValueError, match="Got int64"):
        reference.run(graph, {"a": codes, "b": codes.astype(int)})
    with pytest.raises(ValueError, match="same number of samples"):
        reference.run(graph, {"a": codes, "b": codes[:1]})


def test_every_operation_of_the_graph_has_a_function():
    kinds = {c for c in vars(ir).values() if isinstance(c, type) and getattr(c, "kind", "")}
    assert set(reference._FUNCTIONS) == kinds
