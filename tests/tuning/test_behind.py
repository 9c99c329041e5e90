"""What is behind a block: its loss sees the logits, and the float model stays as it was."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import blocks, programs, reconstruct
from keras_lowbit.tuning.behind import Behind, with_logits
from keras_lowbit.tuning.block_model import BlockModel, logit_error
from tests.tuning.nets import images, mobile, quantized, small

K = keras.layers
X = images()


def found(model, low):
    quantized_, floating = programs.pair(low, model)
    return blocks.find(programs.logits(quantized_), programs.logits(floating))


def test_the_blocks_behind_give_the_models_logits():
    model = mobile(softmax=True)
    parts = found(model, quantized(model))
    whole = keras.Model(model.input, model.get_layer("pool").output)(X)
    head = model.get_layer("head")
    logits = ops.convert_to_numpy(ops.matmul(whole, head.kernel) + head.bias)
    feeds = [X]
    for i, block in enumerate(parts):
        feeds = programs.forward(block.floating, feeds)
        got = Behind(parts[i + 1 :])([ops.convert_to_tensor(a) for a in feeds])
        # Sums of reals in another order.
        np.testing.assert_allclose(ops.convert_to_numpy(got[0]), logits, rtol=1e-4, atol=1e-5)


def test_a_loss_by_hand():
    # KL((1/2, 1/2) || (3/4, 1/4)) = ln(4/3) / 2
    def behind(got):
        return [ops.concatenate([got[0], 0 * got[0]], axis=-1)]

    loss = with_logits(lambda wanted, got: ops.mean(wanted[0] - got[0]), behind, 3.0)
    got = ops.convert_to_tensor([[np.log(3.0)]], "float32")
    wanted = [ops.convert_to_tensor([[5.0]], "float32"), ops.zeros((1, 2))]
    expected = 5 - np.log(3) + 3 * np.log(4 / 3) / 2
    assert float(loss(wanted, [got])) == pytest.approx(expected, rel=1e-6)  # float32


def one_of_two():
    """A block of two channels, of which the logits behind it see the first alone."""
    inputs = keras.Input((2, 2, 2))
    x = K.Conv2D(2, 1, use_bias=True, name="block")(inputs)
    x = K.Conv2D(2, 1, use_bias=False, name="reader")(x)
    x = K.GlobalAveragePooling2D(name="pool")(x)
    x = K.Dense(2, use_bias=False, name="head")(x)
    model = keras.Model(inputs, x, name="one_of_two")
    model.get_layer("block").set_weights([np.eye(2)[None, None], np.zeros(2)])
    model.get_layer("reader").set_weights([np.array([[[[1.0, -1.0], [0.0, 0.0]]]])])
    model.get_layer("head").set_weights([np.eye(2)])
    return model


def test_only_what_the_logits_feel_moves_when_they_alone_count(monkeypatch):
    monkeypatch.setattr(  # the block's own error, taken out of the sum
        "keras_lowbit.tuning.block_model.squared_error",
        lambda variances: lambda wanted, got: 0.0 * ops.mean(got[0]),
    )
    model = one_of_two()
    x = np.random.default_rng(0).normal(size=(16, 2, 2, 2)).astype("float32")
    low = calibrate(quantize_model(model, "w4a4"), x)
    before = np.array(ops.convert_to_numpy(low.get_layer("block").bias))
    reconstruct(low, model, x, steps=2, batch_size=8, blocks=["block"], drop=0, logit_weight=1.0)
    moved = ops.convert_to_numpy(low.get_layer("block").bias) != before
    assert moved.tolist() == [True, False]


def test_logits_come_nearer_and_the_float_model_stays_trainable():
    model = small()
    model.get_layer("dw").trainable = False
    flags = [v.trainable for v in model.variables]
    low = quantized(model, "w2a4")
    wanted = ops.convert_to_numpy(model(X))
    start = float(logit_error([wanted], [ops.convert_to_numpy(low(X))]))
    options = {"batch_size": 8, "blocks": ["stem_relu"]}
    reconstruct(low, model, X, steps=20, logit_weight=1.0, **options)
    assert float(logit_error([wanted], [ops.convert_to_numpy(low(X))])) < start
    assert [v.trainable for v in model.variables] == flags


def test_a_failed_step_leaves_the_float_model_trainable(monkeypatch):
    model = small()
    flags = [v.trainable for v in model.variables]

    def failing(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockModel, "train_on_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(quantized(model), model, X, steps=2, logit_weight=1.0)
    assert [v.trainable for v in model.variables] == flags


@pytest.mark.once
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range(weight):
    model = small()
    with pytest.raises(ValueError, match="logit_weight must be a finite number, at least 0"):
        reconstruct(quantized(model), model, X, logit_weight=weight)


@pytest.mark.once
def test_a_model_without_logits():
    whole = small()
    model = keras.Model(whole.input, whole.get_layer("stem_relu").output)
    with pytest.raises(ValueError, match=r"logit_weight needs a model with one output"):
        reconstruct(quantized(model), model, X, logit_weight=1.0)
