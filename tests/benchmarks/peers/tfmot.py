"""TensorFlow Model Optimization Toolkit: its default 8-bit scheme, on tf-keras."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import functools

import tensorflow_model_optimization as tfmot
import tf_keras as keras

from tests.benchmarks.peers import keras_net, task


def main():
    given = task.arguments(__doc__)
    float_net = functools.partial(keras_net.resnet20, keras, given.blocks)
    steps = keras_net.steps_of(
        keras,
        float_net,
        lambda: tfmot.quantization.keras.quantize_model(float_net()),
        task.batch_of(given.batch),
        keras_net.TENSORFLOW_FORMS,
    )
    packages = ("tensorflow-model-optimization", "tf-keras", "tensorflow")
    task.report("TFMOT", "w8a8", packages, steps, given)


if __name__ == "__main__":
    main()
