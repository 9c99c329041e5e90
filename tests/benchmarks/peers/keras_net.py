"""ResNet-20 of layers only, for peers that speak Keras 2 or 3.

Shortcuts that change size are 1x1 convolutions (option B of the paper): some peers take no other
operation than layers. Float and quantized nets are the same graph, so ratios compare.
"""

from __future__ import annotations

import functools

from tests.benchmarks.peers.task import CLASSES, SHAPE


def resnet20(keras, blocks=3, *, conv=None, relu=None, dense=None, stem=None):
    """A functional model that ends in logits.

    Args:
        keras: the Keras module to build with.
        blocks: residual blocks in each of three groups.
        conv: `conv(filters, size, strides)`, the layer inside; `None` for a float one.
        relu: makes the activation behind a batch norm or an addition.
        dense: `dense(classes)`, the head.
        stem: the first convolution, as `conv`.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, 4.2.
    """
    layers = keras.layers

    def float_conv(filters, size, strides):
        return layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)

    conv, stem = conv or float_conv, stem or float_conv
    relu, dense = relu or layers.ReLU, dense or layers.Dense
    inputs = keras.Input(SHAPE)
    x = relu()(layers.BatchNormalization()(stem(16, 3, 1)(inputs)))
    for group, filters in enumerate((16, 32, 64)):
        for block in range(blocks):
            strides = 2 if group and not block else 1
            y = relu()(layers.BatchNormalization()(conv(filters, 3, strides)(x)))
            y = layers.BatchNormalization()(conv(filters, 3, 1)(y))
            if strides == 2:
                x = layers.BatchNormalization()(conv(filters, 1, 2)(x))
            x = relu()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, dense(CLASSES)(x))


def steps_of(keras, float_model, quantized_model, batch, forms):
    """Training steps by `(kind, form)`.

    Args:
        keras: the Keras module.
        float_model: makes the float model.
        quantized_model: makes the quantized one.
        batch: `(x, y)`.
        forms: names of forms to `jit_compile` of `compile`.
    """
    made = {}
    for form, jit in forms.items():
        for kind, make in (("float", float_model), ("quantized", quantized_model)):
            model = make()
            model.compile(
                optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                jit_compile=jit,
            )
            made[kind, form] = _step(keras, model, batch)
    return made


def _step(keras, model, batch):
    """One training step, which ends when its loss is known."""
    if keras.__name__ != "tf_keras":
        return functools.partial(model.train_on_batch, *batch)
    # There train_on_batch makes and drops a tf.data pipeline, and waits for the thread that tunes
    # it, which looks up after 10, 30, 70, ... 630, 1270 ms: all steps seem to take 1.27 s.
    import tensorflow as tf

    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    train = model.make_train_function()
    return lambda: float(train(batches)["loss"])


# What `compile` of Keras on TensorFlow can do: ordinary graph, or all of it by XLA.
TENSORFLOW_FORMS = {"plain": False, "jit": True}
