"""Sign activations in integers, with numbers worked by hand."""

import numpy as np
import pytest

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import signs
from keras_lowbit.integer.emit import Emitter
from keras_lowbit.integer.values import Linear, NotExportable, OnGrid
from keras_lowbit.numerics.grid import Grid

pytestmark = pytest.mark.once

SIGNS = Grid(2.0, 0, 1, 1, signs=True)
STEPS = Grid(0.5, -128, 127, 8)


def dense(kernel, kernel_scale, bias, grid=STEPS, factor=1.0):
    """A product of two inputs; kernel rows are inputs."""
    kernel = np.array(kernel, np.int8)
    return Linear(
        op=ir.FullyConnected,
        inputs=OnGrid("x", grid, factor, (1, 2)),
        kernel=kernel,
        kernel_scale=np.array(kernel_scale),
        bias=np.array(bias),
        kernel_bits=4,
        shape=(1, kernel.shape[1]),
        source="product",
        attributes={},
    )


def threshold(value):
    made = OnGrid("y", SIGNS, 3.0, value.shape)
    return [x.tolist() for x in signs.threshold(value, made, 2**30)]


def test_the_bias_is_the_first_sum_that_is_positive():
    """Unit 0.5 * 0.25. Biases of 0, 2.4, -2.4 and -2 units: y >= 0 from sums 0, -2, 3 and 2 on."""
    value = dense([[1, 1, 1, 1], [2, 2, 2, 2]], [0.25] * 4, np.array([0, 2.4, -2.4, -2]) / 8)
    kernel, scale, bias = threshold(value)
    assert bias == [1, 3, -2, -1]
    assert kernel == value.kernel.tolist()
    # Written 6 a code of the output, 0.5 of the input: a sum of 1 is one code.
    assert scale == [12, 12, 12, 12]


def test_an_input_of_signs_moves_the_threshold_by_half_the_kernels_sum():
    """x = 2h - 1 and kernel (1, 2): w x = 2 w h - 3, at or above 0 from w h = 1.5, so from 2 on."""
    _, scale, bias = threshold(dense([[1], [2]], [0.25], [0.0], SIGNS, 3.0))
    assert bias == [-1]
    assert scale == [1]


def test_a_tie_of_signs_is_positive():
    """Kernel (1, 1): h = (1, 0) gives 1 - 1 = 0, whose sign is 1."""
    _, _, bias = threshold(dense([[1], [1]], [0.1], [0.0], SIGNS, 3.0))
    assert 1 + bias[0] == 1
    assert 0 + bias[0] == 0


def test_a_channel_without_gain_has_the_sign_of_its_bias():
    kernel, _, bias = threshold(dense([[1, 1, 1], [2, 2, 2]], [0, 0, 0], [0.1, 0.0, -0.1]))
    assert kernel == [[0, 0, 0], [0, 0, 0]]
    assert bias == [1, 1, 0]


def test_a_huge_bias_ends_where_no_sum_reaches():
    _, _, bias = threshold(dense([[1, 1], [1, 1]], [1e-30] * 2, [1.0, -1.0]))
    assert bias == [2**30 + 1, -(2**30) + 1]


def test_what_reads_signs_has_minus_the_kernels_sum_in_its_bias():
    """Kernel scale 0.25, sums 3 and -1: 0.5 - 0.75 and 0.5 + 0.25."""
    value = signs.folded(dense([[1, -2], [2, 1]], [0.25, 0.25], [0.5, 0.5], SIGNS, 3.0))
    assert value.bias.tolist() == [-0.25, 0.75]
    plain = dense([[1], [2]], [0.25], [0.5])
    assert signs.folded(plain) is plain


def test_kernel_sums_are_by_output_channel():
    value = dense([[1], [2]], [1.0], [0.0])
    deep = np.arange(12).reshape(1, 2, 3, 2)
    made = Linear(ir.DepthwiseConv2D, value.inputs, deep, None, None, 1, (), "", {})
    assert signs.kernel_sums(made).tolist() == [6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bias):
    with pytest.raises(NotExportable, match="product: NaN or infinite weights"):
        Emitter().put(dense([[1], [1]], [1.0], [bias]), SIGNS, "y")


def test_codes_of_signs_are_zero_and_one():
    with pytest.raises(ValueError, match=r"codes of signs are 0 and 1. Got -1..1"):
        Grid(1.0, -1, 1, 1, signs=True)
    assert not SIGNS.same_as(Grid(2.0, 0, 1, 1))
