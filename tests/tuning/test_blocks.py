"""Blocks in the graph, and whether two models correspond."""

import keras
import numpy as np
import pytest

from keras_lowbit import walk
from keras_lowbit.quantizers import LSQ
from keras_lowbit.transform.fold_batchnorm import fold_batchnorm
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import blocks, programs
from tests.tuning.nets import K, images, mobile, quantized

pytestmark = pytest.mark.once


def found(model, names=None):
    """`[(name, products)]` of a float model's blocks."""
    pair = programs.pair(quantize_model(model, "w4a4"), model)
    return [(block.name, block.products) for block in blocks.find(*pair, names)]


def chain(*layers, shape=(8, 8, 3)):
    x = inputs = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def test_a_mobile_net_falls_into_its_bottlenecks():
    want = [("b1_project_bn", 4), ("b2_add", 3), ("b3_project_bn", 3), ("head", 1)]
    assert found(mobile()) == want
    folded = [(name.removesuffix("_bn"), n) for name, n in want]
    assert found(fold_batchnorm(mobile())) == folded


def test_mobilenet_v2_has_a_stem_sixteen_bottlenecks_and_a_head():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None)
    program = walk.flatten(model)
    made = blocks.find(program, program)
    assert [block.products for block in made] == [3] * 17 + [2]
    assert made[0].name == "expanded_conv_project_BN"
    assert [block.name for block in made if block.name.endswith("_add")] == [
        f"block_{i}_add" for i in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)
    ]


def test_a_chain_is_cut_after_four_products_and_its_pools_go_with_the_next():
    convs = [K.Conv2D(2, 3, padding="same", activation="relu", name=f"c{i}") for i in range(6)]
    model = chain(*convs[:4], K.MaxPooling2D(name="pool"), *convs[4:], K.Flatten(), K.Dense(2))
    assert next(name for name, _ in found(model)) == "c3"
    assert [products for _, products in found(model)] == [4, 3]


def test_an_activation_behind_a_sum_ends_its_block():
    x = inputs = keras.Input((8, 8, 2))
    y = K.Conv2D(2, 3, padding="same", activation="relu", name="a")(x)
    y = K.Conv2D(2, 3, padding="same", name="b")(y)
    x = K.ReLU(name="relu")(K.Add(name="sum")([x, y]))
    x = K.GlobalAveragePooling2D(name="pool")(K.Conv2D(3, 1, activation="relu", name="c")(x))
    model = keras.Model(inputs, K.Dense(2, name="d")(x))
    assert found(model) == [("relu", 2), ("d", 2)]


def test_blocks_can_be_named():
    assert found(mobile(), ["b2_add", "stem_relu"]) == [
        ("stem_relu", 1),
        ("b2_add", 6),
        ("head", 4),
    ]


def test_a_name_that_carries_not_everything_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'b2_dw'.*Cuts: .*'b1_dw'") as error:
        found(mobile(), ["b2_dw"])
    assert "Did you mean" in str(error.value)


def test_the_blocks_in_a_row_are_the_model():
    model = mobile()
    low = quantized(model)
    x = images(5)
    for side, whole in (("floating", model), ("quantized", low)):
        values = [x]
        for block in blocks.find(*programs.pair(low, model)):
            values = programs.forward(getattr(block, side), values)
        np.testing.assert_array_equal(values[0], programs.forward(walk.flatten(whole), [x])[0])


def test_other_float_models_are_refused_by_the_first_layer_that_differs():
    model = mobile()
    low = quantize_model(model, "w4a4")
    with pytest.raises(
        ValueError, match=r"stem_bn is \('batch_norm', \(4,\)\) in the first and abs"
    ):
        programs.pair(low, fold_batchnorm(model))
    other = chain(K.Conv2D(2, 3, name="stem"), shape=(9, 7, 3))
    with pytest.raises(ValueError, match=r"differ in \d+ layers; stem is .* Pass the float model"):
        programs.pair(low, other)


def test_models_in_the_wrong_order_are_refused():
    model = mobile()
    with pytest.raises(ValueError, match=r"mobile has no quantized layer: pass"):
        programs.pair(model, quantize_model(model, "w4a4"))


def test_logits_lie_before_a_softmax_wherever_it_stands():
    fused = mobile(softmax=True)
    plain = mobile()
    alone = keras.Model(plain.input, K.Softmax()(plain.output))
    x = images(3)
    want = programs.forward(walk.flatten(plain), [x])[0]
    for model in (fused, alone):
        # Sums to one before the softmax is taken away.
        np.testing.assert_allclose(programs.forward(walk.flatten(alone), [x])[0].sum(-1), 1, 1e-5)
        got = programs.forward(programs.logits(walk.flatten(model)), [x])[0]
        np.testing.assert_array_equal(got, want)
    assert fused.get_layer("head").activation.__name__ == "softmax"
    low = programs.logits(walk.flatten(quantize_model(fused, "w8a8")))
    assert "softmax" not in [call.operation.name for call in low.calls]


def test_shared_names_make_no_cut_where_the_activation_differs():
    # A sigmoid cannot be quantized with its product: the quantized `c` ends before it.
    model = chain(
        K.Conv2D(2, 3, activation="sigmoid", name="c"), K.Conv2D(2, 3, name="d"), K.Flatten()
    )
    low = quantize_model(model, "w4a4")
    assert isinstance(low.get_layer("c").kernel_quantizer, LSQ)
    assert "c" not in blocks._common_cuts(*programs.pair(low, model))


def test_a_softmax_amid_the_net_is_computed():
    """A gate of probabilities inside a product, and probabilities that another output reads."""
    inputs = keras.Input((6, 5, 3))
    gate = keras.layers.Conv2D(3, 1, activation="softmax", name="gate")(inputs)
    hidden = keras.layers.Flatten()(keras.layers.Multiply()([inputs, gate]))
    read = keras.layers.Dense(4, activation="softmax", name="read")(hidden)
    also = keras.layers.Softmax(name="also")(keras.layers.Dense(3, name="scores")(hidden))
    last = keras.layers.Dense(2, activation="softmax", name="last")(
        keras.layers.Concatenate()([read, also])
    )
    model = keras.Model(inputs, [last, read, also])
    x = np.random.default_rng(0).normal(size=(4, 6, 5, 3)).astype("float32")
    wanted = [keras.ops.convert_to_numpy(one) for one in model(x)]
    program = programs.logits(walk.flatten(model))
    scores, *probabilities = programs.forward(program, [x])
    # A program runs call by call, a model as a whole: sums in float32 of another order.
    for got, want in zip(probabilities, wanted[1:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(scores.sum(-1) - 1).min() > 1e-3
    odds = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(odds, wanted[0], rtol=1e-5)
