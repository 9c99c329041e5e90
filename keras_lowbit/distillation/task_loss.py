"""Models that compute their task loss themselves, and keep it when they are saved."""

from __future__ import annotations

import keras


class KeepsTaskLoss:
    """Mixin in front of a Keras model that has the loss of `compile` as `task_loss`.

    Keras, which is given none to apply, would save none, and load a model that is not compiled.
    """

    def get_compile_config(self):
        """Arguments of `compile`, the loss among them."""
        config = super().get_compile_config()
        return config and {
            **config,
            "loss": keras.saving.serialize_keras_object(self.task_loss),
        }

    def compile_from_config(self, config):
        """The reverse; variables of the optimizer are made, so that a file can fill them."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)
