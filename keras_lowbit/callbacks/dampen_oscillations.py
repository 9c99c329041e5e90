"""Latent weights pulled to the middle of their bins, ever stronger."""

from __future__ import annotations

import keras

from keras_lowbit.callbacks.penalties import attach_penalties, kernels_with_bins
from keras_lowbit.callbacks.schedules import half_cosine
from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.regularizers import Dampening


def attach_dampening(
    model: keras.Model, strength: float = 0.1, max_bits: int = 4
) -> dict[str, Dampening]:
    """Put the dampening penalty on the latent kernels of a model with few bits.

        loss += strength * sum over kernels of sum (q(w) - clip(w))^2

    Its strength is a variable `pull` of each quantizer, so compiled steps see it move. Neither is
    in files: attach again after loading. Lists of `get_weights()` get longer by the former. A
    second call changes the strength.

    Args:
        model: a built model of `quantize_model`.
        strength: lambda, at least 0.
        max_bits: kernels whose scheme asks for more are left alone; they hardly oscillate.

    Returns:
        The penalty of each kernel, by layer name (`<name>/pointwise` for separable layers).

    Raises:
        ValueError: no such kernel, a negative strength, or a kernel with another regularizer.

    Reference:
        Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022,
        arXiv:2203.11086.
    """
    strength = checked_number(strength, who="attach_dampening: strength", least=0)
    found = {
        name: kernel
        for name, kernel in kernels_with_bins(model).items()
        if kernel.quantizer.target_bits <= max_bits
    }
    if not found:
        raise ValueError(
            f"{model.name} has no kernel of {max_bits} bits or less to dampen. Quantize it at the "
            "scheme to end with, such as quantize_model(model, 'w4a4'), or give max_bits"
        )
    for kernel in found.values():
        kernel.quantizer.add_pull()
        kernel.quantizer.pull.assign(strength)
    penalties = {
        name: Dampening(kernel.quantizer, kernel.quantizer.pull) for name, kernel in found.items()
    }
    return attach_penalties(model, found, penalties)


class DampenOscillations(keras.callbacks.Callback):
    """Raises the strength of `attach_dampening` by a half cosine, epoch by epoch.

        lambda(epoch) = strength * (1 - cos(pi * epoch / last)) / 2        last: epochs - 1

    So weights move freely at first and settle at the end. It follows from the epoch alone, so a
    run that resumes goes on as if never killed. The penalty stays on the model when training ends;
    `attach_dampening(model, 0.0)` silences it.

    Args:
        strength: lambda of the last epoch.
        max_bits: kernels whose scheme asks for more are left alone.

    Raises:
        ValueError: a negative strength, `max_bits` below 1; when training starts, as
            `attach_dampening`.

    Reference:
        Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022,
        arXiv:2203.11086. There lambda rises step by step.
    """

    def __init__(self, strength: float = 0.1, max_bits: int = 4):
        super().__init__()
        self.strength = checked_number(strength, who="DampenOscillations: strength", least=0)
        self.max_bits = checked_count(max_bits, who="DampenOscillations: max_bits", least=1)
        self._penalties = {}

    def set_model(self, model):
        """Attach the penalty, before the step is compiled."""
        super().set_model(model)
        self._penalties = attach_dampening(model, 0.0, self.max_bits)

    def strength_at(self, epoch: int, epochs: int) -> float:
        """Lambda of an epoch of a `fit` that ends at `epochs`."""
        return self.strength * (half_cosine(epoch / (epochs - 1)) if epochs > 1 else 1.0)

    def on_epoch_begin(self, epoch, logs=None):
        """Set lambda."""
        strength = self.strength_at(epoch, self.params.get("epochs") or epoch + 1)
        for penalty in self._penalties.values():
            penalty.strength.assign(strength)
