"""`freeze`: the inference model computes the reference's codes and nothing in it trains."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import calibrate, freeze, quantize_model
from keras_lowbit.integer import frozen, reference
from keras_lowbit.integer.build import integer_graph

K = keras.layers
SHAPE = (7, 6, 3)


def images(count=16, seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def trained(scheme="w4a4"):
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(6, 3, padding="same", use_bias=False)(inputs)
    x = K.ReLU()(K.BatchNormalization()(x))
    y = K.DepthwiseConv2D(3, padding="same", activation="relu6")(x)
    x = K.Add()([x, K.Conv2D(6, 1)(y)])
    x = K.Concatenate()([K.MaxPooling2D(2)(x), K.AveragePooling2D(2)(x)])
    model = keras.Model(inputs, K.Dense(4, activation="softmax")(K.Flatten()(x)))
    return calibrate(quantize_model(model, scheme), images())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w2a2"])
def test_every_tensor_of_the_frozen_model_equals_the_reference(scheme):
    model = trained(scheme)
    graph = integer_graph(model)
    found = frozen.tensors_of(freeze(model), images(5, seed=1))
    wanted = reference.run(graph, {graph.inputs[0]: images(5, seed=1)})
    assert set(found) == set(wanted)
    for name, codes in wanted.items():
        np.testing.assert_array_equal(found[name], codes, err_msg=name)


def test_the_frozen_model_predicts_what_the_trained_model_predicts():
    model = trained("w8a8")
    x = images(64, seed=2)
    before, after = model.predict(x, verbose=0), freeze(model).predict(x, verbose=0)
    # Probabilities in steps of 1/256; sums of the training graph fall on either side of a tie.
    assert np.abs(before - after).max() < 3 / 256
    assert np.mean(before.argmax(-1) == after.argmax(-1)) > 0.95


def test_the_trained_model_stays_as_it_was():
    model = trained()
    before = [w.copy() for w in model.get_weights()]
    freeze(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_saved_frozen_model_computes_the_same_codes(tmp_path):
    model = freeze(trained())
    model.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(
        loaded.predict(images(5), verbose=0), model.predict(images(5), verbose=0)
    )


def test_nothing_in_a_frozen_model_trains():
    assert freeze(trained()).trainable_weights == []


def test_pixels_go_in_as_bytes():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 3, padding="same")(K.Rescaling(1 / 127.5, -1.0)(inputs))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    pixels = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(np.uint8)
    small = calibrate(quantize_model(model), pixels.astype(np.float32))
    made = freeze(small, input_type="uint8")
    assert made.inputs[0].dtype == "uint8"
    expected = ops.convert_to_numpy(small(pixels.astype(np.float32)))
    step = frozen.graph_of(made).tensors[frozen.graph_of(made).ops[-1].inputs[0]].scale
    assert np.abs(made.predict(pixels, verbose=0) - expected).max() <= 1.01 * step


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="input_type must be one of"):
        freeze(trained(), input_type="int4")
    with pytest.raises(ValueError, match="weights must be one of"):
        freeze(trained(), weights="int2")


def test_operations_keep_names_of_their_own_beside_copied_layers():
    """Keras counts on from the operations it has seen: its next names are those of the layers."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 1, name="add_2")(inputs)
    y = K.Conv2D(3, 1, name="relu_1")(inputs)
    x = ops.relu(ops.add(ops.add(x, y), x))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    small = calibrate(quantize_model(model), images())
    assert integer_graph(small).ops


def test_a_dict_of_outputs_stays_one():
    inputs = keras.Input(SHAPE)
    x = K.GlobalAveragePooling2D()(K.Conv2D(4, 3)(inputs))
    outputs = {"second": K.Dense(2, name="b")(x), "first": K.Dense(3, name="a")(x)}
    model = calibrate(quantize_model(keras.Model(inputs, outputs), "w8a8"), images())
    trained, made = model.predict(images(), verbose=0), freeze(model).predict(images(), verbose=0)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in trained.items()}
    for key, layer in (("first", "a_quantize"), ("second", "b_quantize")):
        step = float(ops.convert_to_numpy(model.get_layer(layer).quantizer.scale))
        # One code: float32 sums on either side of a tie.
        np.testing.assert_allclose(made[key], trained[key], atol=1.01 * step)
