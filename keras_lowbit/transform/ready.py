"""Whether a quantized model computes what its file will: scales from data, quantizers that work."""

from __future__ import annotations

import keras

from keras_lowbit import walk
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.calibrate import activation_quantizers


def uncalibrated(model: keras.Model) -> list[str]:
    """Names of layers with an activation quantizer that never saw data."""
    found = []
    for call in walk.flatten(model).calls:
        for quantizer in activation_quantizers(call.operation):
            if not quantizer.is_calibrated:
                found.append(call.name)
    return list(dict.fromkeys(found))


def check_ready(model: keras.Model, *, who: str) -> None:
    """Refuse a model whose errors are not those of the model to export.

    Args:
        model: quantized.
        who: the function that asks; the errors name it.

    Raises:
        ValueError: an activation quantizer saw no data; a quantizer is switched off, as in the
            first stage of `callbacks.TwoStage`.
    """
    missing = uncalibrated(model)
    if missing:
        raise ValueError(f"{who}: calibrate {model.name} first. {missing[:3]} have seen no data")
    off = [f"{s.layer_name}.{s.argument}" for s in sites_of(model) if not s.quantizer.enabled]
    if off:
        raise ValueError(
            f"{who}: at {off[:3]} of {model.name} quantization is switched off, so its errors are "
            "not those of the model to export. Train to the stage that quantizes it, or call "
            "set_enabled(True)"
        )
