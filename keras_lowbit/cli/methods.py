"""The `[methods]` section of a recipe: what a training does beyond one `fit` at fixed bits."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_lowbit.callbacks import (
    ChannelBalanceDecay,
    StochasticPrecision,
    TernaryPhases,
    TwoStage,
)
from keras_lowbit.callbacks.two_stage import LATER
from keras_lowbit.scheme import TERNARY
from keras_lowbit.training import Stage, StagePlan
from keras_lowbit.transform import snap_levels

ORDERS = ("", *LATER)
# Batches for the batch norms at the entry of a stage, as in `CyclicTraining`.
STAGE_BATCHES = 50


@dataclass(frozen=True)
class Methods:
    """Training methods of a recipe; the defaults use none.

    Args:
        two_stage: `"weights_first"` or `"activations_first"`: what comes second joins at
            `switch_epoch` (`callbacks.TwoStage`); empty for both at once.
        switch_epoch: where the second stage of `two_stage` begins, or up to where ternary kernels
            stay float (`callbacks.TernaryPhases`).
        stochastic: probability that a block is quantized in the first step, 1 for always; it rises
            to 1 over 60 % of the steps (`callbacks.StochasticPrecision`).
        mutual: with `[train] distill`, the float model learns from the quantized one meanwhile
            (`distillation.MutualDistiller`).
        cycles: how often `[train] bit_descent` is gone through, each stage with a new optimizer
            and its own cosine (`training.CyclicTraining`), `[train] epochs` in all; 0 for once,
            in one `fit`.
        return_epochs: epochs in float between cycles.
        pull: strength of the cosine-to-ternary penalty.
        balance: let the pull of `activation = "channel_balanced"` fall to nothing.
        snap_epoch: from which epoch learned levels lie on integers (`snap_levels`); -1 leaves that
            to the end.
    """

    two_stage: str = ""
    switch_epoch: int = 0
    stochastic: float = 1.0
    mutual: bool = False
    cycles: int = 0
    return_epochs: int = 0
    pull: float = 0.0
    balance: bool = False
    snap_epoch: int = -1


def check_methods(recipe, where: str) -> None:
    """`ValueError` naming the place of a value that is out of range or fits nothing else.

    Args:
        recipe: `recipe.Recipe`.
        where: file and section, for the message.
    """
    methods, train, quantize = recipe.methods, recipe.train, recipe.quantize
    ternary = recipe.scheme is not None and recipe.scheme.kernel == TERNARY
    if methods == Methods():
        return
    if recipe.scheme is None or not train.epochs:
        raise ValueError(f"{where}: methods need a [quantize] scheme and [train] epochs above 0")
    if methods.two_stage not in ORDERS:
        raise ValueError(f"{where}: two_stage must be one of {ORDERS}. Got {methods.two_stage!r}")
    switched = bool(methods.two_stage) or methods.pull > 0
    least = 1 if methods.two_stage else 0
    if switched and not least <= methods.switch_epoch < train.epochs:
        raise ValueError(
            f"{where}: switch_epoch must be from {least} to {train.epochs - 1}, before the "
            f"{train.epochs} epochs end. Got {methods.switch_epoch}"
        )
    if methods.switch_epoch and not switched:
        raise ValueError(f"{where}: switch_epoch belongs to two_stage or pull; give one of them")
    if not 0 <= methods.stochastic <= 1:
        raise ValueError(f"{where}: stochastic must lie in 0..1. Got {methods.stochastic}")
    if methods.mutual and not train.distill:
        raise ValueError(f"{where}: mutual needs [train] distill above 0")
    if not methods.pull >= 0:
        raise ValueError(f"{where}: pull must be at least 0. Got {methods.pull}")
    if methods.pull and not ternary:
        raise ValueError(f"{where}: pull needs ternary kernels, such as [quantize] scheme 'wta8'")
    if methods.balance and quantize.activation != "channel_balanced":
        raise ValueError(f"{where}: balance needs [quantize] activation = 'channel_balanced'")
    if methods.snap_epoch >= 0 and quantize.kernel != "levels":
        raise ValueError(f"{where}: snap_epoch needs [quantize] kernel = 'levels'")
    if not -1 <= methods.snap_epoch < train.epochs:
        raise ValueError(
            f"{where}: snap_epoch must be -1 or an epoch of 0..{train.epochs - 1}. "
            f"Got {methods.snap_epoch}"
        )
    if methods.cycles < 0 or methods.return_epochs < 0:
        raise ValueError(f"{where}: cycles and return_epochs must be at least 0")
    if methods.cycles:
        _check_cycles(methods, train, where)
    elif methods.return_epochs:
        raise ValueError(f"{where}: return_epochs needs cycles of 2 or more")


def _check_cycles(methods, train, where):
    if methods.two_stage or methods.pull or methods.stochastic < 1 or methods.snap_epoch >= 0:
        raise ValueError(
            f"{where}: cycles go with distill and mutual only: two_stage, stochastic, pull and "
            "snap_epoch count the epochs of one fit"
        )
    if (methods.cycles > 1) != (methods.return_epochs > 0):
        raise ValueError(
            f"{where}: return_epochs is the float training between cycles: above 0 for 2 or more "
            f"cycles, else 0. Got cycles = {methods.cycles}, return_epochs = "
            f"{methods.return_epochs}"
        )
    starts = sorted(int(epoch) for epoch in train.bit_descent)
    if not starts or starts[0] != 0:
        raise ValueError(
            f"{where}: cycles need [train] bit_descent from epoch 0 of a cycle on, such as "
            "{0 = 4, 2 = 3, 4 = 2}"
        )
    each, rest = cycle_epochs(methods, train)
    if rest or each <= starts[-1]:
        raise ValueError(
            f"{where}: {train.epochs} epochs less {methods.cycles - 1} times "
            f"{methods.return_epochs} must be {methods.cycles} cycles of one length above "
            f"{starts[-1]}"
        )


def cycle_epochs(methods: Methods, train) -> tuple[int, int]:
    """Epochs of a cycle, and what is left over."""
    between = (methods.cycles - 1) * methods.return_epochs
    return divmod(train.epochs - between, methods.cycles)


def stages_of(methods: Methods, train) -> tuple[StagePlan, Stage | None]:
    """Plan of a cycle and the stage between cycles, from `bit_descent`."""
    each, _ = cycle_epochs(methods, train)
    descent = sorted((int(epoch), bits) for epoch, bits in train.bit_descent.items())
    ends = [start for start, _ in descent[1:]] + [each]
    epochs = [end - start for (start, _), end in zip(descent, ends, strict=True)]
    plan = StagePlan.descent(
        [bits for _, bits in descent], epochs=epochs, learning_rate=train.learning_rate
    )
    if methods.cycles == 1:
        return plan, None
    return plan, Stage("float", None, None, methods.return_epochs, train.learning_rate)


def callbacks_of(methods: Methods, train, batches) -> list[keras.callbacks.Callback]:
    """Callbacks of one `fit` on `batches`, from which batch norms of ternary kernels start."""
    made: list[keras.callbacks.Callback] = []
    if methods.two_stage:
        made.append(TwoStage(methods.switch_epoch, methods.two_stage))
    if methods.stochastic < 1:
        made.append(StochasticPrecision(p0=methods.stochastic, seed=train.seed))
    if methods.pull:
        phases = TernaryPhases(
            methods.switch_epoch,
            batches,
            steps=STAGE_BATCHES,
            strength=methods.pull,
        )
        made.append(phases)
    if methods.balance:
        made.append(ChannelBalanceDecay())
    return made


class SnapLevels(keras.callbacks.Callback):
    """Learned levels onto integers at the beginning of an epoch, and in a run resumed after it."""

    def __init__(self, student: keras.Model, epoch: int):
        super().__init__()
        self.student, self.epoch = student, epoch

    def on_epoch_begin(self, epoch, logs=None):
        """Snapping twice changes nothing."""
        if epoch >= self.epoch:
            snap_levels(self.student)
