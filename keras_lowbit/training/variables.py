"""What an optimizer does differently with scales and levels than with kernels."""

from __future__ import annotations

import re

import keras

from keras_lowbit.optimizers import unwrapped
from keras_lowbit.quantizers.sites import sites_of


def exclude_from_weight_decay(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Let weight decay act on kernels alone.

    Left out are the variables of quantizers (scales, levels, thresholds), and all others with one
    axis or none: biases, gains and shifts of norms. Decay would only fight what they fit.

        sgd = keras.optimizers.SGD(0.1, weight_decay=1e-4)
        model.compile(exclude_from_weight_decay(sgd, model), ...)

    It replaces what was excluded before. Files of Keras do not keep it: with a loaded model, or one
    whose optimizer has trained already, call it again before the next `fit`:

        model = keras.saving.load_model("m.keras")
        exclude_from_weight_decay(model.optimizer, model)

    Args:
        optimizer: with a `weight_decay`.
        model: a built model.

    Returns:
        The optimizer.

    Raises:
        ValueError: the optimizer has no weight decay.
    """
    own = unwrapped(optimizer)
    if not own.weight_decay:
        raise ValueError(
            f"exclude_from_weight_decay: {own.name} has no weight decay: give weight_decay"
        )
    learned = {id(v) for site in sites_of(model) for v in site.quantizer.trainable_variables}
    own.exclude_from_weight_decay(
        var_list=[v for v in model.trainable_variables if id(v) in learned or len(v.shape) <= 1]
    )
    if unwrapped(getattr(model, "optimizer", None)) is own:
        model.train_function = None  # a compiled step would go on as it was traced
    return optimizer


def quantizer_rates(model: keras.Model, rate: float) -> dict[str, float]:
    """The rates of `optimizers.RatedSGD` and `RatedAdam` for what a model's quantizers train.

        RatedAdam(1e-3, rates=quantizer_rates(model, 1e-2))       # scales and levels at 1e-5

    LSQ's own factor on the scale's gradient stays; Adam does not feel that one, SGD does.

    Args:
        model: a built model.
        rate: factor on the learning rate.

    Returns:
        A pattern for the end of each variable's path, and the factor.

    Raises:
        ValueError: no quantizer trains anything.
    """
    # Not whole paths: those of a loaded model lack the layer. Names of quantizers stay.
    ends = [
        f"{site.quantizer.name}/{v.name}"
        for site in sites_of(model)
        for v in site.quantizer.trainable_variables
    ]
    if not ends:
        raise ValueError(
            f"quantizer_rates: no quantizer of {model.name} trains a scale or levels. 'lsq', "
            "'pact', 'levels' and 'threshold' do"
        )
    return {f"(^|/){re.escape(end)}$": float(rate) for end in ends}
