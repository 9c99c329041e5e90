"""Kernels of a layer as packed codes: how `save_packed` stores them and how layers read them back.

A layer's entry in the weights file holds, for each kernel that Keras would store under `"<i>"`:

    <i>_codes   uint8, `numerics.packing.pack` of (code - lo) / step, unsigned
    <i>_grid    int32: bits, lo, step (2 where codes are odd numbers: binary kernels, DoReFa's),
                and `reciprocal` of `latents`
    <i>_scale   float32, broadcasts over the kernel
    <i>_table   int16, only where codes are no evenly spaced numbers: then `<i>_codes` holds places
                in this table, (levels, ...), of which the axes behind the first broadcast

and `sha256`, 32 bytes over everything else in the entry. Other variables stay as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics.packing import pack, unpack

_PARTS = {
    "kernel_quantizer": ("", "kernel"),
    "depthwise_quantizer": ("depthwise", "depthwise_kernel"),
    "pointwise_quantizer": ("pointwise", "pointwise_kernel"),
}
_SUFFIXES = ("_codes", "_grid", "_scale", "_table")
_DIGEST = "sha256"
# While `save_packed` writes: {layer name: why a kernel of it stays float}.
_writing: contextvars.ContextVar[dict | None] = contextvars.ContextVar("writing", default=None)


@dataclass(frozen=True)
class Kernel:
    """A latent kernel of a quantized layer.

    Args:
        part: `""`, or `"depthwise"` and `"pointwise"` of a separable layer.
        latent: the float variable.
        quantizer: its quantizer; `None` for a kernel that stays float.
        depthwise: whether it is `(h, w, c, multiplier)`, one filter an output channel `c * m + j`.
    """

    part: str
    latent: Any
    quantizer: Any
    depthwise: bool = False

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes (int8; int16 above 8 bits) and float32 scale that the layer computes with.

        Raises:
            ValueError: the quantizer has no codes now, and the way out.
        """
        return _encoded(ops.convert_to_tensor(self.latent), self.quantizer)


def kernels(layer) -> list[Kernel]:
    """The kernels of a quantized layer, in the order of their products."""
    alone = isinstance(layer, keras.layers.DepthwiseConv2D)
    return [
        Kernel(
            part,
            getattr(layer, variable),
            getattr(layer, argument),
            depthwise=alone or part == "depthwise",
        )
        for argument, (part, variable) in _PARTS.items()
        if hasattr(layer, argument)
    ]


def latents(codes, scale, bits: int, quantizer, *, reciprocal=False) -> np.ndarray:
    """Float32 kernel that `quantizer` at `bits` bits turns into `codes` and `scale` again.

    It is `code * scale`. A binary kernel's scale is the mean of `|latent|`, and a mean of equal
    numbers is not always that number, so there magnitudes differ in their last digits
    (`_with_mean`). A quantizer that defines `from_codes(codes, scale)` answers itself.

    Args:
        codes: integers, the kernel's shape.
        scale: float32, broadcasts over `codes`.
        bits: width of a code.
        quantizer: whose kernel it is.
        reciprocal: means are sums times `1 / n`, as XLA computes them, and not sums over `n`.
    """
    if hasattr(quantizer, "from_codes"):
        return np.asarray(quantizer.from_codes(codes, scale), np.float32)
    if bits == 1:
        return _with_mean(codes, scale, reciprocal)
    return codes.astype(np.float32) * scale


def _with_mean(codes, scale, reciprocal):
    """Magnitudes whose float32 mean is exactly `scale`, summed in any order.

    All are whole multiples of one power of two `u`, and their sum `K u` stays within 2^24 `u`, so
    no partial sum rounds; `K` is the whole number for which `K u / n` rounds to the scale, by both
    ways to divide if one does.
    """
    count = codes.size // scale.size
    total = scale.astype(np.float64) * count
    unit = 2.0 ** (np.floor(np.log2(total)) - 23)
    whole, best = np.rint(total / unit), np.zeros(scale.shape, int)
    for step in (0, 1, -1, 2, -2):
        number = np.rint(total / unit) + step
        summed = (number * unit).astype(np.float32)
        divided = summed / np.float32(count) == scale
        multiplied = summed * (np.float32(1) / np.float32(count)) == scale
        score = 2 * multiplied + divided if reciprocal else 2 * divided + multiplied
        whole, best = np.where(score > best, number, whole), np.maximum(score, best)
    each, left = np.divmod(whole, count)
    order = np.arange(count).reshape(-1, *[1] * scale.ndim)
    magnitudes = ((each + (order < left)) * unit).astype(np.float32)
    return codes * magnitudes.reshape(codes.shape)


def _encoded(latent, quantizer):
    # First: it refuses quantizers that have no whole-number codes now.
    dtype = np.int8 if quantizer.code_width <= 8 else np.int16
    codes, scale = quantizer.to_codes(latent)
    codes = np.rint(ops.convert_to_numpy(codes)).astype(dtype)
    return codes, np.asarray(ops.convert_to_numpy(scale), np.float32)


@contextlib.contextmanager
def writing() -> Iterator[dict[str, str]]:
    """Inside the block quantized layers save packed codes.

    Yields:
        `{layer name: why}`, filled with the kernels that stay float.
    """
    kept: dict[str, str] = {}
    token = _writing.set(kept)
    try:
        yield kept
    finally:
        _writing.reset(token)


def is_writing() -> bool:
    """Whether a `writing` block is active."""
    return _writing.get() is not None


def write(layer, plain: Mapping[str, Any], store) -> None:
    """Store what Keras would (`plain`), kernels as packed codes."""
    entry = {}
    for key, value in plain.items():
        found = [k for k in kernels(layer) if k.latent is value]
        packed = _packed(layer, found[0]) if found else None
        if packed is None:
            entry[key] = np.asarray(ops.convert_to_numpy(value))
        else:
            entry.update({key + suffix: array for suffix, array in packed.items()})
    for key, value in {**entry, _DIGEST: _digest(entry)}.items():
        store[key] = value


def _packed(layer, kernel):
    """The arrays of a kernel by suffix, or `None` with the reason noted."""
    kept, quantizer = _writing.get(), kernel.quantizer
    name = f"{layer.name}/{kernel.part}" if kernel.part else layer.name
    if quantizer is None:
        kept[name] = "its kernel has no quantizer"
        return None
    if quantizer.bits > 8:
        kept[name] = f"its kernel has {quantizer.bits} bits, and at most 8 are packed"
        return None
    codes, scale = kernel.codes()
    for reciprocal in (False, True):
        restored = latents(codes, scale, quantizer.bits, quantizer, reciprocal=reciprocal)
        again = _encoded(ops.convert_to_tensor(restored), quantizer)
        if np.array_equal(codes, again[0]) and np.array_equal(scale, again[1]):
            break
    else:
        kept[name] = f"{type(quantizer).__name__} does not get its codes back from code * scale"
        return None
    if hasattr(quantizer, "code_table"):
        table = quantizer.code_table()
        places = np.sum(codes[None] >= _under(table[1:], codes), axis=0)
        grid = np.asarray([quantizer.bits, 0, 1, reciprocal], np.int32)
        packed = pack(places, quantizer.bits, signed=False)
        return {"_codes": packed, "_grid": grid, "_scale": scale, "_table": table}
    lo, hi = quantizer.static_bounds()
    step = 2 if hi - lo >= 2**quantizer.bits else 1
    packed = pack((codes.astype(np.int16) - lo) // step, quantizer.bits, signed=False)
    grid = np.asarray([quantizer.bits, lo, step, reciprocal], np.int32)
    return {"_codes": packed, "_grid": grid, "_scale": scale}


def _under(table, codes):
    """`table` with axes of one between its first and those that broadcast over `codes`."""
    missing = codes.ndim - (table.ndim - 1)
    return table.reshape(len(table), *[1] * missing, *table.shape[1:])


def is_packed(store) -> bool:
    """Whether a layer's entry in a weights file was written by `write`."""
    return _DIGEST in tuple(store.keys())


def read(layer, plain: Mapping[str, Any], store) -> dict[str, np.ndarray]:
    """What Keras expects in the layer's entry: kernels as float32 latents.

    Args:
        layer: the quantized layer.
        plain: what Keras would store now, which tells keys and kernels apart.
        store: the entry that `write` made.

    Raises:
        ValueError: the entry is damaged, or belongs to another layer.
    """
    entry = {key: np.asarray(store[key]) for key in tuple(store.keys())}
    stored = entry.pop(_DIGEST)
    if not np.array_equal(stored, _digest(entry)):
        raise ValueError(
            f"{layer.name}: its packed weights are damaged (SHA-256 differs). Get the file again"
        )
    known = {key: k for key, value in plain.items() for k in kernels(layer) if k.latent is value}
    found = {key: value for key, value in entry.items() if not key.endswith(_SUFFIXES)}
    for key in (k.removesuffix("_codes") for k in entry if k.endswith("_codes")):
        if key not in known or known[key].quantizer is None:
            raise ValueError(
                f"{layer.name}: the file holds packed codes for its variable {key}, which is no "
                "quantized kernel here. Load the file into the model that it was saved from"
            )
        kernel, (bits, lo, step, reciprocal) = known[key], entry[f"{key}_grid"].tolist()
        packed = unpack(entry[f"{key}_codes"], bits, tuple(kernel.latent.shape), signed=False)
        codes = packed.astype(np.int16) * step + lo
        if f"{key}_table" in entry:
            table = entry[f"{key}_table"]
            places = codes[None]
            columns = np.broadcast_to(_under(table, codes), (len(table), *codes.shape))
            codes = np.take_along_axis(columns, places, axis=0)[0]
        scale = entry[f"{key}_scale"]
        found[key] = latents(codes, scale, bits, kernel.quantizer, reciprocal=bool(reciprocal))
    return found


def _digest(entry):
    total = hashlib.sha256()
    for key in sorted(entry):
        array = np.ascontiguousarray(entry[key])
        total.update(f"{key} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return np.frombuffer(total.digest(), np.uint8)
