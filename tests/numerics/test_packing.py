"""Packing loses nothing, takes the bytes it says, and lays them out as stated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_lowbit.numerics.packing import (
    pack,
    packed_size,
    unpack,
)

pytestmark = pytest.mark.once

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)


@st.composite
def coded(draw):
    """(codes, bits, signed): any width, any shape, every code allowed."""
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    shape = draw(SHAPES)
    lo = -(2 ** (bits - 1)) if signed else 0
    codes = draw(hnp.arrays(np.int64, shape, elements=st.integers(lo, lo + 2**bits - 1)))
    if bits == 1 and signed:
        codes = codes * 2 + 1  # {-1, 0} -> {-1, +1}
    return codes, bits, signed


@given(coded())
def test_packing_and_unpacking_changes_nothing(case):
    codes, bits, signed = case
    packed = pack(codes, bits, signed=signed)
    again = unpack(packed.tobytes(), bits, codes.shape, signed=signed)
    assert again.dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(again, codes)


@given(coded())
def test_packed_codes_take_their_bits_rounded_up_to_a_byte(case):
    codes, bits, signed = case
    packed = pack(codes, bits, signed=signed)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_size(codes.size, bits),)
    assert 8 * (packed.size - 1) < codes.size * bits <= 8 * packed.size


@pytest.mark.parametrize(
    ("codes", "bits", "signed", "expected"),
    [
        ([1, 2], 4, True, [0x21]),  # low nibble first
        ([-1, 7, -8], 4, True, [0x7F, 0x08]),
        ([15, 0, 3], 4, False, [0x0F, 0x03]),
        ([0, 1, -2, -1], 2, True, [0b11_10_01_00]),
        ([3, 2, 1, 0, 2], 2, False, [0b00_01_10_11, 0b10]),
        ([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, False, [0b10000001, 1]),
        ([1, -1, -1, 1], 1, True, [0b1001]),
        # 001 010 011 as a little-endian stream: bits 100 010 11|0 -> 0b11010001, 0
        ([1, 2, 3], 3, False, [0b11_010_001, 0b0]),
        ([-1, -4, 3], 3, True, [0b11_100_111, 0b0]),
        ([-1, 2], 8, True, [0xFF, 0x02]),
    ],
)
def test_low_bits_come_first(codes, bits, signed, expected):
    np.testing.assert_array_equal(pack(np.array(codes), bits, signed=signed), expected)


@pytest.mark.parametrize(
    ("codes", "bits", "signed", "message"),
    [
        ([8], 4, True, r"-8\.\.7\. Got 8"),
        ([-1], 4, False, r"0\.\.15\. Got -1"),
        ([0], 1, True, r"\{-1, 1\}\. Got 0"),
        ([2], 1, False, r"\{0, 1\}\. Got 2"),
        ([0.5], 4, True, "must be integers"),
        ([0], 9, True, r"1\.\.8. Got 9"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, bits, signed, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(codes), bits, signed=signed)


def test_damaged_bytes_are_refused():
    with pytest.raises(ValueError, match=r"5 codes of 4 bits take 3 bytes\. Got 2"):
        unpack(b"ab", 4, (5,))
