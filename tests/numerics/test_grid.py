"""The ends of grids, by a table and by one formula for ints and tensors."""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.numerics.grid import MAX_BITS, ROLES, Grid, check_bits, code_bounds

TABLE = [
    # role, signed, bits, lo, hi
    ("kernel", True, 1, -1, 1),
    ("kernel", True, 2, -2, 1),
    ("kernel", True, 3, -4, 3),
    ("kernel", True, 4, -7, 7),
    ("kernel", True, 5, -15, 15),
    ("kernel", True, 8, -127, 127),
    ("kernel", True, 16, -32767, 32767),
    ("activation", True, 1, -1, 1),
    ("activation", True, 2, -1, 1),
    ("activation", True, 3, -3, 3),
    ("activation", True, 4, -7, 7),
    ("activation", True, 7, -63, 63),
    ("activation", True, 8, -128, 127),
    ("activation", True, 9, -256, 255),
    ("activation", True, 16, -32768, 32767),
    ("activation", False, 1, 0, 1),
    ("activation", False, 2, 0, 3),
    ("activation", False, 4, 0, 15),
    ("activation", False, 8, 0, 255),
    ("activation", False, 16, 0, 65535),
    ("kernel", False, 3, 0, 7),
]


@pytest.mark.parametrize(("role", "signed", "bits", "lo", "hi"), TABLE)
def test_the_ends_are_those_of_the_table(role, signed, bits, lo, hi):
    assert code_bounds(bits, signed=signed, role=role) == (lo, hi)
    assert code_bounds(np.int64(bits), signed=signed, role=role) == (lo, hi)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("signed", [True, False])
def test_a_tensor_of_bits_gives_what_an_int_gives(role, signed):
    for bits in range(1, MAX_BITS + 1):
        tensors = code_bounds(ops.convert_to_tensor(float(bits)), signed=signed, role=role)
        got = tuple(float(ops.convert_to_numpy(t)) for t in tensors)
        assert got == code_bounds(bits, signed=signed, role=role)


@pytest.mark.once
class TestBits:
    @pytest.mark.parametrize("bits", [1, 16, 4.0, np.int32(3), np.float32(8)])
    def test_whole_numbers_pass(self, bits):
        got = check_bits(bits, who="x")
        assert got == bits
        assert type(got) is int

    @pytest.mark.parametrize(
        "bits", [0, 17, -1, 3.5, True, "4", None, float("nan"), float("inf"), [4]]
    )
    def test_others_are_refused_by_name(self, bits):
        with pytest.raises(ValueError, match=r"conv1: bits .* from 1 to 16\. Got"):
            check_bits(bits, who="conv1")


@pytest.mark.once
class TestGrid:
    @pytest.mark.parametrize(
        ("lo", "hi", "zero_point"),
        [
            (0, 255, -128),
            (0, 15, -128),
            (0, 1, -128),
            (-7, 7, 0),
            (-127, 127, 0),
            (-128, 127, 0),
            (-2, 1, 0),
            (-1, 1, 0),
            (-100, 155, -28),  # code -100 is written as -128
            (-127, 128, -1),
            (-255, 0, 127),
        ],
    )
    def test_zero_points_of_int8(self, lo, hi, zero_point):
        grid = Grid(0.1, lo, hi, 8)
        assert grid.zero_point == zero_point
        assert lo + grid.zero_point >= -128
        assert hi + grid.zero_point <= 127

    def test_it_is_signed_where_negative_codes_exist(self):
        assert Grid(1.0, -1, 1, 2).signed
        assert not Grid(1.0, 0, 1, 1).signed

    @pytest.mark.parametrize(("lo", "hi"), [(1, 3), (-3, -1)])
    def test_it_must_hold_zero(self, lo, hi):
        with pytest.raises(ValueError, match="include 0"):
            Grid(1.0, lo, hi, 2)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), np.array([1.0, 0.0])])
    def test_its_scale_is_positive_and_finite(self, scale):
        with pytest.raises(ValueError, match="positive and finite"):
            Grid(scale, 0, 3, 2)

    def test_grids_are_compared_in_float32(self):
        grid = Grid(0.1, 0, 15, 4)
        assert grid.same_as(Grid(float(np.float32(0.1)), 0, 15, 4))
        assert not grid.same_as(Grid(0.1, 0, 7, 4))
        assert not grid.same_as(Grid(np.nextafter(np.float32(0.1), np.float32(1)), 0, 15, 4))
