"""Codes of few bits as bytes: a dense bit stream, low bits first.

For 4 bits this is the int4 of TFLite (two codes a byte, low nibble first), for 2 bits its int2.
"""

from __future__ import annotations

import math

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: `ceil(count * bits / 8)`."""
    return -(-count * bits // 8)


def pack(codes, bits: int, *, signed: bool = True) -> np.ndarray:
    """Pack integer codes: bit `j` of code `i` is bit `i * bits + j` of a little-endian stream.

    Signed codes are stored in two's complement. One signed bit is the sign code of a binary
    kernel: -1 is stored as 0, +1 as 1.

    Args:
        codes: integers of any shape, packed in C order.
        bits: width of a code, 1..8.
        signed: whether codes span `-2^(bits-1)..2^(bits-1)-1` (`{-1, +1}` for one bit) or
            `0..2^bits-1`.

    Returns:
        uint8 vector of `packed_size(codes.size, bits)` bytes; unused bits of the last are 0.

    Raises:
        ValueError: for another width, or codes that it does not hold.
    """
    codes = np.asarray(codes).reshape(-1)
    _check_bits(bits)
    _check_codes(codes, _allowed(bits, signed), f"{bits}-bit {'signed' if signed else 'unsigned'}")
    if bits == 1 and signed:
        codes = codes > 0
    # Two's complement, so the low bits of the byte are the code whatever its sign.
    low_bytes = codes.astype(np.int16).astype(np.uint8)
    table = np.unpackbits(low_bytes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(table.reshape(-1), bitorder="little")


def unpack(data, bits: int, shape, *, signed: bool = True) -> np.ndarray:
    """Inverse of `pack`.

    Args:
        data: bytes or a uint8 vector from `pack`.
        bits: width of a code, 1..8.
        shape: shape of the codes.
        signed: as given to `pack`.

    Returns:
        int8 array (uint8 when not `signed`) of shape `shape`.

    Raises:
        ValueError: for another width, or data of another size.
    """
    _check_bits(bits)
    count = math.prod(shape)
    data = _as_bytes(data, packed_size(count, bits), f"{count} codes of {bits} bits")
    if 8 % bits:
        table = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
        codes = np.packbits(table, axis=1, bitorder="little").reshape(shape)
    else:  # no code crosses a byte
        places = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (data[:, None] >> places) & np.uint8(2**bits - 1)
        codes = codes.reshape(-1)[:count].reshape(shape)
    if not signed:
        return codes
    if bits == 1:
        return (codes.astype(np.int8) * 2 - 1).astype(np.int8)
    half = 1 << (bits - 1)
    return ((codes.astype(np.int16) ^ half) - half).astype(np.int8)


def _allowed(bits, signed):
    if signed and bits == 1:
        return (-1, 1)
    lo = -(1 << (bits - 1)) if signed else 0
    return range(lo, lo + (1 << bits))


def _check_bits(bits):
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1..8. Got {bits}")


def _check_codes(codes, allowed, what):
    if codes.size and not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"Codes must be integers. Got dtype {codes.dtype}; round them first.")
    wrong = codes[~np.isin(codes, tuple(allowed))]
    if wrong.size:
        shown = f"{{{', '.join(map(str, allowed))}}}" if len(allowed) < 4 else allowed
        if isinstance(shown, range):
            shown = f"{shown[0]}..{shown[-1]}"
        raise ValueError(f"A {what} code must be in {shown}. Got {wrong[0]}; clip codes first.")


def _as_bytes(data, expected, what):
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = np.frombuffer(data, np.uint8)
    data = np.asarray(data, np.uint8).reshape(-1)
    if data.size != expected:
        raise ValueError(f"{what} take {expected} bytes. Got {data.size}; data is damaged or cut.")
    return data
