"""What a model costs, layer by layer, and what stayed float, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras

from keras_lowbit import walk
from keras_lowbit.analysis.rows import FLOAT_BITS, Row, rows_of
from keras_lowbit.progress import table


@dataclass(frozen=True)
class Summary:
    """Rows of a model and their totals; `str()` is the table."""

    model: str
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the model, grids not counted."""
        return sum(row.parameters for row in self.rows)

    @property
    def code_bytes(self) -> int:
        """Bytes of all packed codes."""
        return sum(row.code_bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Bytes of all that stays float32."""
        return sum(row.float_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Codes and what stays float32."""
        return self.code_bytes + self.float_bytes

    @property
    def times_smaller(self) -> float:
        """Bytes of the same parameters in float32, over `bytes`."""
        return 4 * self.parameters / max(self.bytes, 1)

    @property
    def macs(self) -> int | None:
        """Products of one sample; `None` if a row's are unknown."""
        return _total(row.macs for row in self.rows)

    @property
    def bit_operations(self) -> int | None:
        """Sum over all products of `macs * kernel_bits * input_bits`."""
        return _total(row.bit_operations for row in self.rows)

    @property
    def times_fewer_bit_operations(self) -> float | None:
        """Bit-operations of the same products in float32, over `bit_operations`."""
        if not self.bit_operations:
            return None
        return self.macs * FLOAT_BITS**2 / self.bit_operations

    @property
    def floats(self) -> dict[str, str]:
        """What stays float, by name, and why."""
        return {row.name: row.why_float for row in self.rows if row.why_float}

    @property
    def uncalibrated(self) -> list[str]:
        """Names of the rows with a grid of activations that never saw data."""
        return [row.name for row in self.rows if not row.calibrated]

    def __str__(self):
        columns = ("layer", "kind", "kernel", "input", "output", "parameters", "bytes", "bit-op")
        columns = (*columns, "remarks")
        shown = [r for r in self.rows if r.kernel_bits or r.parameters or r.remarks]
        lines = [table(self.model, columns, [_cells(row) for row in shown]), *self._totals()]
        return "\n".join(lines)

    def _totals(self):
        yield (
            f"{self.parameters:,} parameters in {self.bytes:,} bytes ({self.code_bytes:,} of "
            f"codes, {self.float_bytes:,} of float32): 1/{self.times_smaller:.2f} of float32"
        )
        if self.times_fewer_bit_operations is not None:
            yield (
                f"{_short(self.macs)} multiplications a sample, {_short(self.bit_operations)} "
                f"bit-operations: 1/{self.times_fewer_bit_operations:.2f} of float32"
            )
        if self.uncalibrated:
            yield (
                f"{len(self.uncalibrated)} rows wait for scales: "
                "run keras_lowbit.calibrate(model, images)"
            )


def summary(model: keras.Model, print_fn: Callable[[str], None] | None = None) -> Summary:
    """Print and return what each layer of a model costs, and what stayed float, and why.

    A bit-operation is one product of a one-bit number with another: a multiplication of a 4-bit
    kernel with an 8-bit input counts 32, one in float32 counts 1024.

    Args:
        model: functional or Sequential model, quantized or float.
        print_fn: what prints the table; `print` when left out.

    Raises:
        ValueError: a model without a graph.
    """
    rows = tuple(rows_of(walk.flatten(model)))  # first: what is no model has no name
    made = Summary(model.name, rows)
    (print_fn or print)(str(made))
    return made


def _total(values):
    values = list(values)
    return None if None in values else sum(values)


def _short(number):
    for unit, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def _cells(row):
    shape = "x".join("?" if n is None else str(n) for n in row.output_shape[1:])
    operations = "?" if row.bit_operations is None else _short(row.bit_operations)
    return (
        row.name,
        row.kind,
        row.kernel_bits,
        row.input_bits,
        shape,
        f"{row.parameters:,}",
        f"{row.bytes:,}",
        operations if row.kernel_bits else None,
        row.remarks,
    )
