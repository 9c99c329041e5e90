"""Bits that fall step by step while `fit` runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_count
from keras_lowbit.numerics.grid import MAX_EXPORT_BITS
from keras_lowbit.optimizers import averages, velocities
from keras_lowbit.quantizers.sites import Site, sites_of

_ROLES = {"weights": ("kernel",), "activations": ("activation",), "both": ("kernel", "activation")}


class BitDescent(keras.callbacks.Callback):
    """Lowers the bits of quantizers at the beginning of given epochs.

        model = quantize_model(float_model, "w4a4")       # the scheme to end at
        model.fit(..., callbacks=[BitDescent({0: 8, 2: 6, 4: 4})])

    The model is quantized at the scheme it shall end with. A quantizer whose scheme asks for fewer
    than 8 bits follows the plan down to its own width, `max(bits of the plan, bits of its
    scheme)`; those built at 8 bits (first and last layer, inputs of adds and pools) stay there.
    Each change keeps the representable range, `scale' = scale * hi / hi'` (`Quantizer.set_bits`).
    Bits are variables: compiled steps see them without a retrace.

    The bits in force follow from the epoch alone, so a run that resumes
    (`keras.callbacks.BackupAndRestore`, `Resume`, `initial_epoch=`) goes on as if never killed.
    Keras' `EarlyStopping(restore_best_weights=True)` and `ModelCheckpoint(save_best_only=True)`
    know nothing of bits: weights of an epoch before the last change are those of a wider net.

    Args:
        plan: `{epoch: bits}`, epochs from 0. Before its first epoch bits stay as they are.
        targets: `"weights"`, `"activations"` or `"both"`.
        verbose: 1 prints a line at each change.

    Raises:
        ValueError: empty plan, epochs or bits out of range, unknown targets; when training starts:
            an epoch that never comes, a plan that goes below the model's scheme, or a model
            without quantizers of fewer than 8 bits.

    Reference:
        Kim, Shin, Del Barrio, CTMQ: Cyclic Training of Convolutional Neural Networks with Multiple
        Quantization Steps, 2022, arXiv:2206.12794. There bits go down by one; here, as planned.
    """

    def __init__(self, plan: Mapping[int, int], targets: str = "both", verbose: int = 0):
        super().__init__()
        self.plan = _checked_plan(plan)
        if targets not in _ROLES:
            raise ValueError(f"BitDescent: targets must be one of {[*_ROLES]}. Got {targets!r}")
        self.targets = targets
        self.verbose = verbose
        # The epoch that last began with a change; `BatchNormReestimation(after=...)` reads it.
        self.changed_in: int | None = None
        self._sites: list[tuple[Site, int]] = []

    def bits_at(self, epoch: int) -> int | None:
        """Bits of the plan that are in force in `epoch`; `None` before its first epoch."""
        begun = [start for start in self.plan if start <= epoch]
        return self.plan[max(begun)] if begun else None

    def set_model(self, model):
        """Find the quantizers that descend, each with the width it was built for."""
        super().set_model(model)
        chosen = [s for s in sites_of(model) if s.quantizer.role in _ROLES[self.targets]]
        pairs = [(s, s.quantizer.target_bits) for s in chosen if s.quantizer.moves_bits]
        self._sites = [(site, target) for site, target in pairs if target < MAX_EXPORT_BITS]

    def on_train_begin(self, logs=None):
        """Check the plan against the model and the number of epochs."""
        self.changed_in = None
        if not self._sites:
            raise ValueError(
                f"BitDescent: {self.model.name} has no quantizer of {self.targets} below "
                f"{MAX_EXPORT_BITS} bits, so nothing would descend. Quantize it at the scheme to "
                "end with, such as quantize_model(model, 'w4a4')"
            )
        lowest, floor = min(self.plan.values()), min(target for _, target in self._sites)
        if lowest < floor:
            raise ValueError(
                f"BitDescent: the plan goes down to {lowest} bits, but {self.model.name} was "
                f"quantized at {floor} or more. Quantize it at the scheme to end with, or let "
                f"the plan end at {floor}"
            )
        last, epochs = max(self.plan), self.params.get("epochs")
        if epochs is not None and last >= epochs:
            raise ValueError(
                f"BitDescent: the plan changes bits at epoch {last}, which never comes: fit runs "
                f"epochs 0 to {epochs - 1}. Shorten the plan or train for {last + 1} epochs or more"
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Give each quantizer the bits of this epoch, unless it has them."""
        planned = self.bits_at(epoch)
        if planned is None:
            return
        changed = 0
        for site, target in self._sites:
            bits = min(max(planned, target), site.quantizer.largest_bits)
            # A resumed run arrives with the bits and scales it left with: never hand over twice.
            if site.quantizer.bits != bits:
                optimizer = getattr(self.model, "optimizer", None)
                with moved_memory(optimizer, site.quantizer.scale):
                    site.quantizer.set_bits(bits)
                changed += 1
        if changed:
            self.changed_in = epoch
            if self.verbose:
                print(
                    f"Epoch {epoch + 1}: {changed} quantizers of {self.targets} at {planned} bits"
                )


@contextlib.contextmanager
def moved_memory(optimizer, scale):
    """Inside the block a scale changes; what the optimizer keeps in its unit changes likewise.

    That is its average (`use_ema`), and the velocity of SGD with momentum: from 2 to 8 bits a scale
    shrinks 127 times, and the old velocity would carry it through 0 in a few steps.

    Args:
        optimizer: `None`, or one of Keras.
        scale: variable of a quantizer, trained or not; `None` for a quantizer without.
    """
    kept = [*averages(optimizer), *velocities(optimizer)]
    memory = [variable for own, variable in kept if own is scale]
    if not memory:
        yield
        return
    before = np.array(ops.convert_to_numpy(scale))
    yield
    ratio = ops.convert_to_numpy(scale) / before
    for variable in memory:
        variable.assign(ops.convert_to_numpy(variable) * ratio)


def _checked_plan(plan) -> dict[int, int]:
    if not isinstance(plan, Mapping) or not plan:
        raise ValueError(
            f"BitDescent: the plan maps epochs to bits, such as {{0: 8, 2: 6, 4: 4}}. Got {plan!r}"
        )
    checked = {}
    for epoch, bits in plan.items():
        epoch = checked_count(epoch, who="BitDescent: an epoch of the plan", least=0)
        checked[epoch] = checked_count(bits, who=f"BitDescent: bits at epoch {epoch}", least=1)
        if bits > MAX_EXPORT_BITS:
            raise ValueError(
                f"BitDescent: bits at epoch {epoch} must be from 1 to {MAX_EXPORT_BITS}. Got {bits}"
            )
    return dict(sorted(checked.items()))
