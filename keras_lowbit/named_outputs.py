"""A functional model whose outputs have names of their own.

Keras names an output after the layer that makes it. The last layer of a quantized model is often a
grid's, while users compile with `loss={"cls": ...}` and read files by the names of the float model.
"""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable(package="keras_lowbit")
class NamedOutputs(keras.Model):
    """A functional model with given `output_names`, which its files keep.

    `keras.models.clone_model` takes the graph alone, so names of a clone are those of its layers.

    Args:
        inputs: as for `keras.Model`.
        outputs: as for `keras.Model`.
        name: of the model.
        output_names: one for each output, flattened; `None` for those of the last layers.
        **kwargs: the other arguments of `keras.Model`.

    Raises:
        ValueError: another number of names than outputs.
    """

    # Keras rebuilds a subclass from its graph only if the positional arguments are these.
    def __init__(self, inputs, outputs, name=None, *, output_names=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        if output_names is None:
            return
        if len(output_names) != len(self.outputs):
            raise ValueError(
                f"{self.name}: expected {len(self.outputs)} output names. Got {list(output_names)}"
            )
        self.output_names = list(output_names)

    def get_config(self):
        """That of a functional model, and the names."""
        return {**super().get_config(), "output_names": list(self.output_names)}


def model_of(inputs, outputs, name, output_names) -> keras.Model:
    """A functional model with these output names; a plain one where they are Keras' own."""
    made = keras.Model(inputs, outputs, name=name)
    if list(made.output_names) == list(output_names):
        return made
    return NamedOutputs(inputs, outputs, name=name, output_names=output_names)
