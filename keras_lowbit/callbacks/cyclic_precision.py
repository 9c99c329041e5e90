"""Bits that go down and up again while `fit` runs."""

from __future__ import annotations

import itertools
import math

from keras_lowbit.callbacks.bit_descent import BitDescent
from keras_lowbit.checks import checked_count
from keras_lowbit.numerics.grid import MAX_EXPORT_BITS


class CyclicPrecision(BitDescent):
    """Bits that fall from `high` to `low` along half a cosine, jump back, and fall again.

        bits(u) = round(low + (high - low) (1 + cos(pi u)) / 2),   u = 0..1 in each cycle

    The epochs are cut into `cycles` of nearly equal length; the first epoch of a cycle runs at
    `high`, its last at `low`, and epochs after the schedule stay at `low`. So low-bit weights
    start the more accurate model, whose weights start the next descent. Quantizers follow as in
    `BitDescent`: never below the width that they were built for, those built at 8 bits not at all,
    and the representable range is kept. `BatchNormReestimation(after=...)` takes one.

    Args:
        low: bits at the end of a cycle, those of the model's scheme.
        high: bits at its start, up to 8.
        cycles: how many.
        epochs: length of the schedule, at least 2 a cycle.
        targets: `"weights"`, `"activations"` or `"both"`.
        verbose: 1 prints a line at each change.

    Raises:
        ValueError: `high` not above `low`, counts out of range, fewer than 2 epochs a cycle; when
            training starts, as `BitDescent`.

    Reference:
        Like CPT, Fu et al., CPT: Efficient Deep Neural Network Training via Cyclic Precision, ICLR
        2021, arXiv:2101.10093 (a reconstruction). Deviations: there bits rise along the cosine and
        drop at the end of a cycle, because the most accurate model is deployed; here they fall,
        because the low-bit one is. There activations and gradients cycle too, for cheaper training;
        here gradients stay float. The fall and the return are those of Kim et al., CTMQ, 2022,
        arXiv:2206.12794.
    """

    def __init__(
        self,
        low: int,
        high: int,
        cycles: int,
        epochs: int,
        targets: str = "both",
        verbose: int = 0,
    ):
        given = {"low": low, "high": high, "cycles": cycles, "epochs": epochs}
        low, high, cycles, epochs = (
            checked_count(value, who=f"CyclicPrecision: {name}", least=1)
            for name, value in given.items()
        )
        if not low < high <= MAX_EXPORT_BITS:
            raise ValueError(
                f"CyclicPrecision: low must be below high, and high at most {MAX_EXPORT_BITS}. "
                f"Got low={low}, high={high}"
            )
        if epochs < 2 * cycles:
            raise ValueError(
                f"CyclicPrecision: a cycle takes at least 2 epochs. Got {epochs} epochs for "
                f"{cycles} cycles; give {2 * cycles} epochs or more"
            )
        super().__init__(_cosine(low, high, cycles, epochs), targets, verbose)
        self.low, self.high, self.cycles, self.epochs = low, high, cycles, epochs


def _cosine(low, high, cycles, epochs) -> dict[int, int]:
    starts = [cycle * epochs // cycles for cycle in range(cycles + 1)]
    plan = {}
    for start, end in itertools.pairwise(starts):
        for epoch in range(start, end):
            u = (epoch - start) / (end - start - 1)
            height = (1.0 + math.cos(math.pi * u)) / 2.0
            # Halves go up; digits of the cosine that platforms may differ in have no say.
            plan[epoch] = math.floor(low + (high - low) * round(height, 9) + 0.5)
    return plan
