"""Stages of training as data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.numerics.grid import MAX_EXPORT_BITS

FLOAT_BITS = 32


@dataclass(frozen=True)
class Stage:
    """One stretch of training at fixed bits.

    Args:
        name: appears in the log; letters, digits, `_`, `.` and `-`.
        kernel_bits: 1..8, or 32 (or `None`) for float.
        activation_bits: likewise.
        epochs: at least 1.
        learning_rate: what the optimizer of the stage is made with; above 0.
        frozen: patterns (`*` and `?`) of what does not train: layers (`"conv1"`, `"backbone/*"`) or
            quantizers (`"*.kernel_quantizer"`: their scales).

    Raises:
        ValueError: any of these out of range.
    """

    name: str
    kernel_bits: int | None
    activation_bits: int | None
    epochs: int
    learning_rate: float
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        allowed = isinstance(self.name, str) and self.name.replace("_", "").replace(".", "")
        if not allowed or not allowed.replace("-", "").isalnum():
            raise ValueError(
                f"Stage: name must be of letters, digits, '_', '.', '-'. Got {self.name!r}"
            )
        for field in ("kernel_bits", "activation_bits"):
            object.__setattr__(self, field, _checked_bits(getattr(self, field), field, self.name))
        epochs = checked_count(
            self.epochs,
            who=f"Stage {self.name}: epochs",
            least=1,
            advice="Leave out a stage that shall not train",
        )
        object.__setattr__(self, "epochs", epochs)
        who = f"Stage {self.name}: learning_rate"
        checked_number(self.learning_rate, who=who, above=0, below=1e6)
        if isinstance(self.frozen, str) or not all(isinstance(p, str) for p in self.frozen):
            raise ValueError(
                f"Stage {self.name}: frozen is a tuple of patterns. Got {self.frozen!r}"
            )
        object.__setattr__(self, "frozen", tuple(self.frozen))

    @property
    def bits(self) -> tuple[int, int]:
        """`(kernel_bits, activation_bits)`, 32 for float."""
        return self.kernel_bits, self.activation_bits


@dataclass(frozen=True)
class StagePlan:
    """Stages of one cycle, from many bits to few.

    Args:
        stages: in order. Neither kernels nor activations rise from one to the next.

    Raises:
        ValueError: no stage, two of one name, or bits that rise.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        given = self.stages
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"StagePlan: stages is a list of at least one Stage. Got {given!r}")
        object.__setattr__(self, "stages", tuple(given))
        for stage in given:
            if not isinstance(stage, Stage):
                raise ValueError(f"StagePlan: expected a Stage. Got {stage!r}")
        names = [stage.name for stage in given]
        if len(set(names)) < len(names):
            raise ValueError(f"StagePlan: each stage has a name of its own. Got {names}")
        for before, after in itertools.pairwise(given):
            for what, old, new in zip(
                ("kernels", "activations"), before.bits, after.bits, strict=True
            ):
                if new > old:
                    raise ValueError(
                        f"StagePlan: {what} rise from {old} bits in {before.name} to {new} in "
                        f"{after.name}. Bits fall inside a cycle; CyclicTraining goes back up "
                        "between cycles, with return_stage"
                    )

    @classmethod
    def descent(
        cls,
        bits: Sequence[int] = (4, 3, 2, 1),
        *,
        epochs: int | Sequence[int],
        learning_rate: float | Sequence[float],
    ) -> StagePlan:
        """Kernels and activations together, one stage for each of `bits`, named `w4a4` and so on.

        Args:
            bits: strictly falling; the paper goes down by one.
            epochs: of each stage, one number or one for each.
            learning_rate: likewise.

        Raises:
            ValueError: bits that do not fall, sequences of other lengths.
        """
        if any(b >= a for a, b in itertools.pairwise(bits)):
            raise ValueError(f"StagePlan.descent: bits must fall strictly. Got {tuple(bits)}")
        columns = []
        for name, given in (("epochs", epochs), ("learning_rate", learning_rate)):
            column = list(given) if isinstance(given, (list, tuple)) else [given] * len(bits)
            if len(column) != len(bits):
                raise ValueError(
                    f"StagePlan.descent: {name} is one number or {len(bits)}. Got {given!r}"
                )
            columns.append(column)
        return cls(
            tuple(Stage(f"w{b}a{b}", b, b, e, r) for b, e, r in zip(bits, *columns, strict=True))
        )

    @property
    def epochs(self) -> int:
        """Epochs of one cycle."""
        return sum(stage.epochs for stage in self.stages)


@dataclass(frozen=True)
class Visit:
    """A stage in its place in the whole training.

    Args:
        index: from 0, over all cycles.
        cycle: from 1.
        stage: what is trained.
        first_epoch: epochs count on over all stages.
        ends_cycle: whether it is the last stage of its cycle.
    """

    index: int
    cycle: int
    stage: Stage
    first_epoch: int
    ends_cycle: bool


def visits(plan: StagePlan, cycles: int, return_stage: Stage | None) -> tuple[Visit, ...]:
    """All stages in order: the plan, then for each further cycle `return_stage` and the plan."""
    found, epoch = [], 0
    for cycle in range(1, cycles + 1):
        stages = plan.stages if cycle == 1 else (return_stage, *plan.stages)
        for i, stage in enumerate(stages):
            found.append(Visit(len(found), cycle, stage, epoch, i + 1 == len(stages)))
            epoch += stage.epochs
    return tuple(found)


def _checked_bits(bits, field, name) -> int:
    if bits is None or bits == FLOAT_BITS:
        return FLOAT_BITS
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_EXPORT_BITS:
        raise ValueError(
            f"Stage {name}: {field} must be 1 to {MAX_EXPORT_BITS}, or {FLOAT_BITS} or None for "
            f"float. Got {bits!r}"
        )
    return bits
