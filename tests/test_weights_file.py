"""The file's own walk fills a model as Keras' reader does."""

from __future__ import annotations

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import weights_file
from keras_lowbit.packed import load_packed, save_packed
from keras_lowbit.transform import calibrate, quantize_model

K = keras.layers
IMAGES = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 3)).astype("float32")


def bytes_of(model, tmp_path):
    """The weights member of the model's file."""
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        return archive.read("model.weights.h5")


def block(x, filters, name):
    inner = inputs = keras.Input(x.shape[1:])
    inner = K.Conv2D(filters, 3, padding="same", use_bias=False)(inner)
    inner = K.ReLU()(K.BatchNormalization()(inner))
    return keras.Model(inputs, inner, name=name)(x)


def nested():
    """Two models inside a model, layers of one class on both levels, a random state."""
    x = inputs = keras.Input((8, 8, 3))
    x = block(x, 4, "first")
    x = K.Dropout(0.5, seed=3)(K.Conv2D(5, 1)(x))
    x = block(x, 6, "second")
    return keras.Model(inputs, K.Dense(2)(K.GlobalAveragePooling2D()(x)))


@keras.saving.register_keras_serializable(package="test_weights_file")
class Holder(keras.layers.Layer):
    """Layers in a list, in a dictionary and in a list inside a list."""

    def build(self, shape):
        self.flat = [K.Dense(2), K.Dense(3), K.EinsumDense("ab,bc->ac", 2)]
        self.deep = [[K.Dense(2)], [K.Dense(3)]]
        self.named = {"a": K.Dense(4)}
        x = keras.KerasTensor((None, *shape[1:]))
        for layer in (*self.flat, *self.deep[0], *self.deep[1], *self.named.values()):
            layer.build(x.shape)
            x = keras.KerasTensor(layer.compute_output_shape(x.shape))

    def call(self, x):
        for layer in (*self.flat, *self.deep[0], *self.deep[1], *self.named.values()):
            x = layer(x)
        return x


def held():
    inputs = keras.Input((3,))
    return keras.Model(inputs, Holder()(inputs))


def quantized():
    return calibrate(quantize_model(nested(), "w4a4"), IMAGES)


def disturbed(model):
    """The model with every number moved."""
    for variable in model.variables:
        if "seed" not in variable.path:
            variable.assign(variable + 1)
    return model


@pytest.mark.parametrize("make", [nested, held, quantized])
def test_every_variable_gets_its_value(make, tmp_path):
    model = make()
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(random.uniform(0.5, 1, variable.shape))
    wanted = [np.array(ops.convert_to_numpy(v)) for v in model.variables]
    content = bytes_of(model, tmp_path)
    weights_file.fill(disturbed(model), content)
    for variable, value in zip(model.variables, wanted, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value, variable.path)


def changed(content, change):
    """The file after `change(h5py.File)`."""
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        change(file)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.move("layers/conv2d", "layers/conv9d"), "the model has no /layers/conv9d"),
        (lambda f: f.create_dataset("layers/stray", data=1.0), "layers is no entry of Keras"),
        (lambda f: f["layers/conv2d/vars/0"].attrs.create("dtype", "bfloat16"), "is bfloat16"),
    ],
)
def test_what_it_does_not_know_is_left_to_keras(change, said, tmp_path):
    model = nested()
    content = changed(bytes_of(model, tmp_path), change)
    with pytest.raises(weights_file.Unknown, match=said):
        weights_file.fill(model, content)


def test_an_entry_that_does_not_fit_is_an_error(tmp_path):
    model = nested()
    content = changed(bytes_of(model, tmp_path), lambda f: f.pop("layers/conv2d/vars/1"))
    with pytest.raises(ValueError, match="conv2d"):
        weights_file.fill(model, content)


@pytest.mark.parametrize("slow", [False, True])
def test_a_packed_model_is_the_same_through_both_readers(slow, tmp_path, monkeypatch):
    def refuse(*_):
        raise weights_file.Unknown("for the test")

    model = quantized()
    save_packed(model, tmp_path / "p.keras")
    if slow:
        monkeypatch.setattr("keras_lowbit.packed.fill", refuse)
    loaded = load_packed(tmp_path / "p.keras", compile=False)
    for layer, other in zip(model.layers, loaded.layers, strict=True):
        assert layer.name == other.name
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(IMAGES)), ops.convert_to_numpy(model(IMAGES))
    )


def test_a_model_saved_again_keeps_its_config(tmp_path):
    save_packed(quantized(), tmp_path / "0.keras")
    configs = []
    for i in range(3):
        with zipfile.ZipFile(tmp_path / f"{i}.keras") as archive:
            configs.append(archive.read("config.json"))
        model = load_packed(tmp_path / f"{i}.keras", compile=False)
        save_packed(model, tmp_path / f"{i + 1}.keras")
    assert b"SkipOnce" in configs[0]
    counts = [config.count(b"SkipOnce") for config in configs]
    assert counts == [counts[0]] * 3
