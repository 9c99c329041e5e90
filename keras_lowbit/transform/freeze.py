"""From a trained model to the one whose forward pass is the integer arithmetic."""

from __future__ import annotations

import keras

from keras_lowbit import walk
from keras_lowbit.integer import frozen
from keras_lowbit.integer.build import integer_graph


def freeze(
    model: keras.Model,
    *,
    input_type: str | None = None,
    output_type: str = "float32",
    weights: str = "int8",
    preprocessing=None,
) -> keras.Model:
    """The inference model: integer arithmetic in `keras.ops`, equal to the exported file.

    Args:
        model: a quantized, calibrated model.
        input_type: as in `tflite_export.convert`.
        output_type: as in `tflite_export.convert`.
        weights: as in `tflite_export.convert`; it decides containers, and with `"int4_all"`
            how finely biases are rounded.
        preprocessing: as in `tflite_export.convert`.

    Returns:
        A Keras model that saves, loads and runs compiled on every backend; nothing in it trains.
        Its outputs are in the structure of the model's: a dict stays one.

    Raises:
        keras_lowbit.NotExportable: names the layer that has no integer form.
    """
    graph = integer_graph(
        model,
        input_type=input_type,
        output_type=output_type,
        weights=weights,
        preprocessing=preprocessing,
    )
    return frozen.build(graph, outputs=walk.flatten(model).outputs)
