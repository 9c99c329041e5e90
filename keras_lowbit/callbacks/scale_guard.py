"""Training that stops where a scale or a weight breaks, with the layer's name."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_count
from keras_lowbit.optimizers import unwrapped
from keras_lowbit.quantizers.sites import layers_of, sites_of
from keras_lowbit.quantizers.state import PositiveScale

# A scale below this share of its start has nothing left to say.
VANISHED = 1e-7


class ScaleError(RuntimeError):
    """A scale or a weight is NaN, infinite, not positive, or has vanished."""


class ScaleGuard(keras.callbacks.Callback):
    """Raises `ScaleError` when training breaks a scale or a weight.

    Checked before the first step, every few batches, at the end of each epoch and at the end of
    `fit`, where an optimizer with `use_ema` has put averages in place of the weights:

    * no weight of any layer is NaN or infinite;
    * every scale is positive;
    * no scale has fallen below `1e-7` of its start, or to the smallest value that its
      constraint lets through. Channels that start there (dead ones) are left alone.

    Args:
        every: batches between two checks inside an epoch.

    Raises:
        ValueError: `every` below 1; before the first step: an activation quantizer that was
            never calibrated.
    """

    def __init__(self, every: int = 100):
        super().__init__()
        self.every = checked_count(every, who="ScaleGuard: every", least=1)
        self._start: dict[int, np.ndarray] | None = None
        self._steps = 0

    def on_train_begin(self, logs=None):
        """Forget an earlier `fit`."""
        self._start, self._steps = None, 0

    def on_epoch_begin(self, epoch, logs=None):
        """Remember the epoch, for the message."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        """Before the first step: note where scales start."""
        # Not in `on_train_begin`: a backup may be restored there, after this callback's turn.
        if self._start is None:
            self._check_calibrated()
            self._start = {id(v): _numpy(v) for _, _, v in self._scales()}
            self._check()

    def on_train_batch_end(self, batch, logs=None):
        """Check every few batches."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._check()

    def on_epoch_end(self, epoch, logs=None):
        """Check."""
        self._check()

    def on_train_end(self, logs=None):
        """Check once more: averages of weights pass by their constraints."""
        if self._start is not None:  # else there was no step
            self._check()

    def _check_calibrated(self):
        names = [
            site.layer_name
            for site in sites_of(self.model)
            if site.quantizer.role == "activation" and not float(_numpy(site.quantizer.calibrated))
        ]
        if names:
            raise ValueError(
                f"ScaleGuard: activations of {names[:5]}{' and others' if names[5:] else ''} were "
                "never calibrated. Call calibrate(model, images) before fit"
            )

    def _scales(self):
        """`(layer name, argument, variable)` of every variable that must stay positive."""
        for site in sites_of(self.model):
            for variable in site.quantizer.weights:
                guarded = isinstance(variable.constraint, PositiveScale)
                if guarded or variable.name == "scale":
                    yield site.layer_name, site.argument, variable

    def _check(self):
        broken = {
            name: variable.path
            for name, layer in layers_of(self.model)
            for variable in layer.weights
            if not np.isfinite(_numpy(variable)).all()
        }
        if broken:
            # One step carries a NaN through the whole model; a small count points at the culprit.
            more = f" (and {len(broken) - 1} more layers)" if len(broken) > 1 else ""
            name, path = next(iter(broken.items()))
            self._stop(name + more, f"weight {path} is NaN or infinite")
        for name, argument, variable in self._scales():
            values, start = _numpy(variable), self._start[id(variable)]
            least = getattr(variable.constraint, "smallest", 0.0)
            if (values <= 0).any():
                self._stop(name, f"scale of {argument} is {values.min():.3g}, not positive")
            fallen = (values <= np.maximum(VANISHED * start, least)) & (values < start)
            if fallen.any():
                self._stop(
                    name,
                    f"scale of {argument} has vanished: from {start[fallen].max():.3g} "
                    f"to {values[fallen].min():.3g}",
                )

    def _stop(self, name, what):
        raise ScaleError(
            f"Layer {name}: {what} (epoch {self._epoch + 1}, step {self._steps} of this fit). "
            "Go back to the last checkpoint with a smaller learning rate, or clip gradients "
            f"(clipnorm=1.0 in the optimizer){self._advice()}"
        )

    def _advice(self):
        optimizer = unwrapped(getattr(self.model, "optimizer", None))
        if optimizer is None or isinstance(optimizer, keras.optimizers.SGD):
            return ""
        # Steps of the others do not shrink with the gradient: clipping changes nothing.
        return (
            f". {type(optimizer).__name__}, unlike SGD, moves a scale by about the learning rate a "
            "step, however small it is: give scales a rate of their own, RatedAdam(rate, "
            "rates=quantizer_rates(model, 0.01)), or train with SGD"
        )


def _numpy(variable):
    # A copy: on some backends the array is a window on memory that the next step overwrites.
    return np.array(ops.convert_to_numpy(variable))
