"""Ternary training in two phases: first the pull, then the projection."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.callbacks.norms import kept, reestimate
from keras_lowbit.callbacks.penalties import attach_penalties, kernels_of
from keras_lowbit.callbacks.schedules import check_switch, cooled, half_cosine
from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.quantizers import Ternary
from keras_lowbit.regularizers import CosineTernaryRegularizer


def attach_cosine(model: keras.Model, strength: float = 1.0) -> dict[str, CosineTernaryRegularizer]:
    """Put the cosine-to-ternary penalty on the latent kernels of a model's `Ternary` quantizers.

        loss += strength * sum over layers of R(kernel)

    The penalty projects as the layer's own quantizer does. Its strength is the variable `pull` of
    the quantizer, so compiled steps see it move, and files keep it; the penalty itself is attached
    again after loading. A second call changes the strength.

    Args:
        model: a built model of `quantize_model` with ternary kernels.
        strength: lambda, at least 0.

    Returns:
        The penalty of each kernel, by layer name (`<name>/pointwise` for separable layers).

    Raises:
        ValueError: no ternary kernel, or a negative strength.
    """
    found = _ternary_kernels(model)
    if not found:
        raise ValueError(
            f"{model.name} has no ternary kernel. Quantize it by quantize_model(model, 'wta8')"
        )
    strength = checked_number(strength, who="attach_cosine: strength", least=0)
    for kernel in found.values():
        kernel.quantizer.pull.assign(strength)
    penalties = {
        name: CosineTernaryRegularizer(
            kernel.quantizer.pull, kernel.quantizer.axis, projection=kernel.quantizer.project
        )
        for name, kernel in found.items()
    }
    return attach_penalties(model, found, penalties)


class TernaryPhases(keras.callbacks.Callback):
    """Pushes float kernels towards ternary ones, then trains ternary ones.

        phase P, epoch < switch_epoch    float kernels; loss + lambda sum R, lambda by a half cosine
                                         from 0 to `strength` in the last epoch of the phase
        phase T, epoch >= switch_epoch   ternary kernels; lambda = keep * strength; temperature by a
                                         half cosine from the first to the second of `temperature`

    At the switch batch norms are re-estimated on `data`. Every epoch logs `ternary_cosine`, the
    mean cosine between filters and their ternary codes over all layers, and
    `ternary_cosine/<layer>`, the mean over the filters of each. Above 0.97 at the switch is a good
    sign. The gradient's re-scaling is the quantizer's: `Ternary(gradient="sigmoid")`.

    Everything but the weights follows from the epoch alone, so a run that resumes goes on as if
    never killed. Training that ends in phase P leaves a model that an exporter refuses; so may
    `EarlyStopping(restore_best_weights=True)`, unless `start_from_epoch=switch_epoch` is given.

    Lambda is 0 between epochs and after training: a later `fit` without this callback, and files
    that callbacks behind this one write, have no penalty. A `fit` that ends in an exception or by
    the keyboard leaves the lambda of its epoch: call `on_train_end()`.

    Args:
        switch_epoch: the first epoch of phase T; 0 for no phase P.
        data: images for `reestimate_batchnorm`; `None` leaves the statistics. Batches of an
            iterator are kept, for a second `fit`.
        strength: largest lambda.
        keep: share of it in phase T.
        temperature: first and last, in units of the threshold.
        steps: batches of `data` to use; `None` for all.
        batch_size: images at a time, for arrays.
        verbose: 1 prints the cosine of each layer at the switch.

    Raises:
        ValueError: counts, strengths or temperatures out of range; when training starts, a switch
            epoch past the end, or a model without ternary kernels.

    Reference:
        Liu, Liu, Hyperspherical Loss-Aware Ternary Quantization, 2022, arXiv:2212.12649: schedule
        reconstructed, only the abstract could be read. The paper regularizes before it ternarizes.
    """

    def __init__(
        self,
        switch_epoch: int,
        data=None,
        *,
        strength: float = 1.0,
        keep: float = 0.1,
        temperature: tuple[float, float] = (1.0, 0.25),
        steps: int | None = 50,
        batch_size: int = 128,
        verbose: int = 0,
    ):
        super().__init__()
        self.switch_epoch = checked_count(switch_epoch, who="TernaryPhases: switch_epoch", least=0)
        self.strength = checked_number(strength, who="TernaryPhases: strength", least=0)
        self.keep = checked_number(keep, who="TernaryPhases: keep", least=0)
        if len(temperature) != 2 or not min(temperature) > 0:
            raise ValueError(
                "TernaryPhases: temperature is the first and the last, both positive. "
                f"Got {temperature!r}"
            )
        self.data, self.steps, self.verbose = data, steps, verbose
        self.batch_size = checked_count(batch_size, who="TernaryPhases: batch_size", least=1)
        self.temperature = tuple(map(float, temperature))
        self._kernels = {}
        self._penalties = {}

    def set_model(self, model):
        """Attach the penalty and the switches, before the step is compiled."""
        super().set_model(model)
        self._penalties = attach_cosine(model, 0.0)
        self._kernels = _ternary_kernels(model)
        add_switches(model, [kernel.quantizer for kernel in self._kernels.values()])

    def on_train_begin(self, logs=None):
        """Check the switch against the number of epochs."""
        check_switch(self, "phase T")

    def strength_at(self, epoch: int) -> float:
        """Lambda of an epoch."""
        if epoch >= self.switch_epoch:
            return self.keep * self.strength
        return self.strength * half_cosine((epoch + 1) / self.switch_epoch)

    def temperature_at(self, epoch: int, epochs: int) -> float:
        """Temperature of an epoch of a `fit` that ends at `epochs`."""
        epoch = max(epoch - self.switch_epoch, 0)
        return cooled(*self.temperature, epoch, epochs - self.switch_epoch)

    def on_epoch_begin(self, epoch, logs=None):
        """Set lambda, temperature and phase."""
        strength = self.strength_at(epoch)
        temperature = self.temperature_at(epoch, self.params.get("epochs") or epoch + 1)
        ternary = epoch >= self.switch_epoch
        for kernel in self._kernels.values():
            kernel.quantizer.pull.assign(strength)
            kernel.quantizer.temperature.assign(temperature)
            if kernel.quantizer.enabled != ternary:
                kernel.quantizer.set_enabled(ternary)
        # By the epoch, not by what changed: switches are in no file, and a resumed run has them on.
        if epoch == self.switch_epoch:
            if self.verbose:
                cosines = ", ".join(f"{k} {v:.3f}" for k, v in self.cosines().items())
                print(f"Epoch {epoch + 1}: ternary from here. Cosines: {cosines}")
            if self.data is not None:
                self.data = kept(self.data, self.steps)
                reestimate(self.model, self.data, self.steps, self.batch_size)

    def on_epoch_end(self, epoch, logs=None):
        """Log the cosines, and end the pull."""
        self.on_train_end()
        if logs is None:
            return
        cosines = self.cosines()
        logs["ternary_cosine"] = float(np.mean(list(cosines.values())))
        logs.update({f"ternary_cosine/{name}": value for name, value in cosines.items()})

    def on_train_end(self, logs=None):
        """Leave a model without the pull."""
        _ = self.model  # On JAX this hands the step's state back, so that variables can move.
        for kernel in self._kernels.values():
            kernel.quantizer.pull.assign(0.0)

    def cosines(self) -> dict[str, float]:
        """Mean cosine over the filters of each ternary kernel, by layer name."""
        return {
            name: float(np.mean(ops.convert_to_numpy(penalty.cosines(self._kernels[name].latent))))
            for name, penalty in self._penalties.items()
        }


def _ternary_kernels(model):
    return {
        name: kernel
        for name, kernel in kernels_of(model).items()
        if isinstance(kernel.quantizer, Ternary)
    }
