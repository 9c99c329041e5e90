"""What will be exported, measured while `fit` runs."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit.callbacks.norms import graphs_of
from keras_lowbit.checks import checked_count
from keras_lowbit.data.answers import top_class
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.freeze import freeze


class ExportGapMonitor(keras.callbacks.Callback):
    """Freezes the model every few epochs and compares it with the model in training.

    Adds to the epoch's logs, shares of the images given:

        frozen_accuracy   images that the frozen model classifies right
        export_gap        images whose top-1 class differs between the model in inference mode and
                          the frozen model: 1 - top-1 agreement

    Under a distiller the first quantized model inside is watched. While a quantizer is switched off
    (`TwoStage`, `TernaryPhases`) nothing can be exported, and nothing is logged.

    List it before callbacks that read the logs. The model is frozen once before training starts, so
    that one that cannot be exported is refused early.

    Args:
        data: `(x, y)`: images as the model takes them, classes as whole numbers or one-hot.
        every: after every so many epochs, and after the last.
        batch_size: images at a time.
        verbose: 0 prints nothing.

    Raises:
        ValueError: data of another form, lengths that differ, counts below 1, several outputs or
            one of a single value.
        keras_lowbit.NotExportable: when training starts, naming the layer.
    """

    ends_each_fit = True  # of a training in stages: acts on the last epoch of each

    def __init__(self, data, every: int = 1, batch_size: int = 128, verbose: int = 1):
        super().__init__()
        if not isinstance(data, (list, tuple)) or len(data) != 2:
            raise ValueError("ExportGapMonitor: data must be the pair (images, classes)")
        self.x, y = np.asarray(data[0]), np.asarray(data[1])
        if not len(self.x) or len(self.x) != len(y):
            raise ValueError(
                "ExportGapMonitor: images and classes must have one common length above 0. "
                f"Got {len(self.x)} and {len(y)}"
            )
        one_hot = y.ndim > 1 and y.shape[-1] > 1
        self.y = y.argmax(-1) if one_hot else y.reshape(len(y))
        self.every = checked_count(every, who="ExportGapMonitor: every", least=1)
        self.batch_size = checked_count(batch_size, who="ExportGapMonitor: batch_size", least=1)
        self.verbose = verbose

    def on_train_begin(self, logs=None):
        """Refuse a model that has no integer form, before any step."""
        model = self._watched()
        if len(model.outputs) != 1 or len(model.inputs) != 1:
            raise ValueError(
                f"ExportGapMonitor: {model.name} must have one input and one output. "
                f"Got {len(model.inputs)} and {len(model.outputs)}"
            )
        if model.output_shape[-1] == 1:
            raise ValueError(
                f"ExportGapMonitor: {model.name} has one output value, which names no class. It "
                "compares models with two classes or more"
            )
        if not self._waits():
            freeze(model)

    def on_epoch_end(self, epoch, logs=None):
        """Measure, log and print."""
        if (epoch + 1) % self.every and epoch + 1 != self.params.get("epochs"):
            return
        if self._waits():
            if self.verbose:
                print(f"Epoch {epoch + 1}: quantizers are switched off, nothing to export yet")
            return
        accuracy, gap = self.measure()
        if logs is not None:
            logs.update(frozen_accuracy=accuracy, export_gap=gap)
        if self.verbose:
            print(
                f"Epoch {epoch + 1}: frozen accuracy {accuracy:.4f}, "
                f"{round(gap * len(self.x))} of {len(self.x)} images classified differently"
            )

    def measure(self) -> tuple[float, float]:
        """`(frozen_accuracy, export_gap)` now."""
        model = self._watched()
        frozen = freeze(model)
        # Compiled or not as the user chose: Keras' own choice, XLA, can take minutes on a CPU.
        frozen.jit_compile = self.model.jit_compile
        codes_in = self.x.astype(keras.backend.standardize_dtype(frozen.inputs[0].dtype))
        exported = top_class(frozen.predict(codes_in, batch_size=self.batch_size, verbose=0))
        trained = top_class(model.predict(self.x, batch_size=self.batch_size, verbose=0))
        return float(np.mean(exported == self.y)), float(np.mean(exported != trained))

    def _watched(self):
        found = graphs_of(self.model)
        if not found:
            raise ValueError(
                f"ExportGapMonitor: {self.model.name} has no graph to read, nor a quantized model "
                "inside that has one"
            )
        return found[0]

    def _waits(self):
        return not all(site.quantizer.enabled for site in sites_of(self._watched()))
