"""Outputs keep the names of the float model: in training, in files, in copies."""

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit import fold_batchnorm, freeze, zoo
from keras_lowbit.transform import calibrate, quantize_model

K = keras.layers
SHAPE = (6, 5, 3)


def images(n=8):
    return np.random.default_rng(0).uniform(0, 1, (n, *SHAPE)).astype("float32")


def detector():
    inputs = keras.Input(SHAPE, name="image")
    x = K.Flatten()(K.Conv2D(4, 3, activation="relu", name="stem")(inputs))
    cls = K.Dense(3, activation="softmax", name="cls")(x)
    box = K.Dense(4, name="box")(x)
    return keras.Model(inputs, [cls, box], name="detector")


def answers(n=8):
    return {"cls": np.eye(3, dtype="float32")[np.arange(n) % 3], "box": np.ones((n, 4), "float32")}


def test_losses_by_output_name_train_the_quantized_model_and_its_reloaded_copy(tmp_path):
    model = calibrate(quantize_model(detector(), "w8a8"), images())
    assert model.output_names == ["cls", "box"]
    losses = {"cls": "categorical_crossentropy", "box": "mse"}
    model.compile("sgd", loss=losses, metrics={"cls": ["accuracy"]})
    history = model.fit(images(), answers(), verbose=0).history
    assert {"cls_loss", "box_loss", "cls_accuracy"} <= set(history)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.output_names == ["cls", "box"]
    loaded.fit(images(), answers(), verbose=0)


def test_layers_keep_the_names_that_they_share_with_the_outputs():
    model = quantize_model(detector(), "w8a8")
    assert model.get_layer("cls").kernel_quantizer.bits == 8
    assert model.get_layer("box").kernel_quantizer.bits == 8


@pytest.mark.parametrize("output_type", ["float32", "int8", "uint8"])
def test_files_and_frozen_models_carry_the_output_names(output_type):
    model = calibrate(quantize_model(detector(), "w8a8"), images())
    result = tflite_export.convert(model, output_type=output_type)
    assert result.graph.outputs == ("cls", "box")
    assert result.frozen.output_names == ["cls", "box"]
    assert freeze(model).output_names == ["cls", "box"]


@pytest.mark.runtime
def test_a_file_with_given_names_is_exact():
    model = calibrate(quantize_model(detector(), "w4a4"), images())
    result = tflite_export.convert(model, verify=images())
    assert result.mismatches == 0
    assert result.verification.by_tensor


def test_a_folded_batch_norm_at_the_end_leaves_its_name_to_the_output():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(2, 3, name="conv")(inputs)
    folded = fold_batchnorm(keras.Model(inputs, K.BatchNormalization(name="logits")(x)))
    assert [layer.name for layer in folded.layers][1:] == ["conv"]
    assert folded.output_names == ["logits"]
    assert quantize_model(folded, "w8a8").output_names == ["logits"]


def test_a_sequential_model_and_a_resized_one_keep_theirs():
    layers = [keras.Input(SHAPE), K.Conv2D(4, 3), K.GlobalAveragePooling2D(), K.Dense(2, name="y")]
    model = quantize_model(keras.Sequential(layers), "w8a8")
    assert model.output_names == ["y"]
    assert zoo.adapt.with_input_shape(model, (9, 9, 3)).output_names == ["y"]
