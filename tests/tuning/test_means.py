"""`tuning.means`: which bias moves a tensor's mean, and where it brings it."""

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.tuning import Rates, reconstruct, streams
from keras_lowbit.tuning.block_model import BlockModel
from keras_lowbit.tuning.means import bias_of, match_means
from tests.tuning.nets import SHAPE, images, quantized, small

K = keras.layers


def net(end, norms=False):
    """One product, and what `end` puts behind it."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 1, use_bias=not norms, name="conv")(inputs)
    return keras.Model(inputs, end(inputs, x))


def found(model, allowed=None):
    """The path of the bias that moves the only output."""
    program = walk.flatten(model)
    (ref,) = walk.refs(program.outputs)
    bias = bias_of(program, ref, model.trainable_variables if allowed is None else allowed)
    return None if bias is None else bias.path


def test_the_bias_that_adds_to_a_tensor_as_it_is():
    assert found(net(lambda _, x: x)) == "conv/bias"
    assert found(net(lambda _, x: K.Dropout(0.5)(x))) == "conv/bias"
    assert found(net(lambda given, x: K.Add()([x, given]))) == "conv/bias"
    assert found(net(lambda given, x: K.Add()([given, x]))) == "conv/bias"
    assert found(net(lambda _, x: K.Add()([x, K.Conv2D(3, 1, name="last")(x)]))) == "last/bias"
    assert found(net(lambda _, x: K.BatchNormalization(name="norm")(x), norms=True)) == "norm/beta"


def test_none_where_no_bias_moves_it_so():
    assert found(net(lambda _, x: K.ReLU()(x))) is None
    assert found(net(lambda _, x: K.Conv2D(3, 1, activation="relu")(x))) is None
    assert found(net(lambda _, x: x, norms=True)) is None
    assert found(net(lambda _, x: x), allowed=[]) is None  # an earlier block has trained it
    # One value for all channels is added to each of three.
    assert found(net(lambda given, _: K.Add()([given, K.Conv2D(1, 1)(given)]))) is None


def test_means_are_those_wanted():
    x = images(40)
    model = net(lambda given, x: K.Add()([x, given]))
    wanted = np.random.default_rng(1).normal(2.0, 3.0, (40, *SHAPE)).astype("float32")
    match_means(
        walk.flatten(model),
        model.trainable_variables,
        [streams.Given(x)],
        [streams.Given(wanted)],
        16,
    )
    got = ops.convert_to_numpy(model(x))
    # Float32 rounding of values around 2.
    np.testing.assert_allclose(got.mean((0, 1, 2)), wanted.mean((0, 1, 2)), atol=1e-5)


def test_a_bias_of_two_outputs_serves_the_first():
    """Outputs b and b + 1 of which 3 and 7 are wanted: b = 3, where the second wants 6."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 1, kernel_initializer="zeros", name="conv")(inputs)
    model = keras.Model(inputs, [x, K.Add()([x, inputs])])
    ones = np.ones((4, *SHAPE), "float32")
    wanted = [streams.Given(3 * ones), streams.Given(7 * ones)]
    biases = [model.get_layer("conv").bias]
    match_means(walk.flatten(model), biases, [streams.Given(ones)], wanted, 4)
    np.testing.assert_array_equal(ops.convert_to_numpy(biases[0]), [3, 3, 3])


def test_reconstruction_begins_and_ends_with_means_in_order(monkeypatch):
    losses, step = [], BlockModel.train_on_batch

    def watched(self, *args, **kwargs):
        losses.append(step(self, *args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(BlockModel, "train_on_batch", watched)
    x, whole = images(), small()
    model = keras.Model(whole.input, whole.get_layer("sum").output)
    model.get_layer("dw").bias.assign([30.0, -20.0, 10.0, 0.0])
    low = quantized(model)
    low.get_layer("dw").bias.assign([0.0, 0.0, 0.0, 0.0])  # a loss of 1
    # One step moves biases by 0.5: too far, and too little for what is missing.
    reconstruct(low, model, x, steps=1, batch_size=8, rates=Rates(biases=0.5), match_means=True)
    assert float(losses[-1]) < 0.1
    one, other = (ops.convert_to_numpy(m(x)).mean((0, 1, 2)) for m in (model, low))
    # The 8-bit grids up to 30 behind the bias round in steps of 0.24: less than half of one.
    np.testing.assert_allclose(one, other, atol=0.1)
