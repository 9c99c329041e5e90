"""This library on the net of the peers: learned scales, w4a4, ends at 8 bits."""

import functools

import keras

import keras_lowbit as klb
from tests.benchmarks.peers import keras_net, task

FORMS = {"tensorflow": keras_net.TENSORFLOW_FORMS, "jax": {"jit": True}, "torch": {"plain": False}}


def main():
    given = task.arguments(__doc__)
    backend = keras.backend.backend()
    batch = task.batch_of(given.batch)
    float_net = functools.partial(keras_net.resnet20, keras, given.blocks)

    def quantized():
        model = klb.quantize_model(float_net(), "w4a4", input_range=(-1, 1))
        return klb.calibrate(model, batch[0][:16])

    steps = keras_net.steps_of(keras, float_net, quantized, batch, FORMS[backend])
    packages = ("keras-lowbit", "keras")
    task.report(f"keras_lowbit ({backend})", "w4a4", packages, steps, given)


if __name__ == "__main__":
    main()
