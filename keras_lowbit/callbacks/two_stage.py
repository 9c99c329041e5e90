"""Kernels first and activations later, or the other way round."""

from __future__ import annotations

import keras

from keras_lowbit.callbacks.schedules import check_switch
from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.checks import checked_count
from keras_lowbit.quantizers.sites import sites_of

# Orders, and the role that waits for the second stage.
LATER = {"weights_first": "activation", "activations_first": "kernel"}


class TwoStage(keras.callbacks.Callback):
    """Quantizes kernels alone, then kernels and activations, within one `fit`.

        epoch < switch_epoch       kernels quantized, activations float
        epoch >= switch_epoch      both quantized

    What waits passes bit for bit as in the float model, whatever its scheme's width, 8-bit ends
    included; validation in the first stage sees it so too. Scales of what waits rest. One thing
    does not wait: behind signs (`quantizers.Sign`) SAME padding is -1 from the start.

    The state follows from the epoch alone, so a run that resumes goes on as if never killed. A run
    that stops in the first stage leaves a model that an exporter refuses.
    Switches are weights: `EarlyStopping(restore_best_weights=True)` may bring back those of the
    first stage, whose losses are often lower; give it `start_from_epoch=switch_epoch`.

    List it before callbacks that run the model at the beginning of an epoch. The model keeps the
    switches that this puts in (`Quantizer.add_switch`): lists of `get_weights()` get longer.

    Args:
        switch_epoch: the first epoch in which both are quantized, from 1.
        order: `"weights_first"`, or `"activations_first"`, where kernels wait.

    Raises:
        ValueError: a switch epoch below 1, an unknown order; when training starts, a switch epoch
            past the end, or a model with nothing to switch.

    Reference:
        Zhuang, Shen, Tan, Liu, Reid, Towards Effective Low-bitwidth Convolutional Neural Networks,
        CVPR 2018, arXiv:1711.00205, two-stage optimization; Zhuang et al., arXiv:1908.04680. From
        memory of the texts. Activations first: as released binary networks (ReActNet) train.
    """

    def __init__(self, switch_epoch: int, order: str = "weights_first"):
        super().__init__()
        self.switch_epoch = checked_count(switch_epoch, who="TwoStage: switch_epoch", least=1)
        if order not in LATER:
            raise ValueError(f"TwoStage: order must be one of {[*LATER]}. Got {order!r}")
        self.order = order
        self._waiting = []

    def set_model(self, model):
        """Find what waits, and give it switches before the step is compiled."""
        super().set_model(model)
        role = LATER[self.order]
        self._waiting = [s.quantizer for s in sites_of(model) if s.quantizer.role == role]
        add_switches(model, self._waiting)

    def on_train_begin(self, logs=None):
        """Check against the model and the number of epochs."""
        if not self._waiting:
            raise ValueError(
                f"TwoStage: {self.model.name} has no quantizer of {LATER[self.order]}s to switch. "
                "Quantize it first, such as quantize_model(model, 'w4a4')"
            )
        check_switch(self, "the second stage")

    def on_epoch_begin(self, epoch, logs=None):
        """Switch, unless it is so."""
        second = epoch >= self.switch_epoch
        for quantizer in self._waiting:
            if quantizer.enabled != second:
                quantizer.set_enabled(second)
