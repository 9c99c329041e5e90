"""A release form that is made of a release form."""

import keras
import numpy as np

from keras_lowbit.packed import check_packed, load_packed, save_packed
from keras_lowbit.transform import calibrate, quantize_model

K = keras.layers


def test_packing_a_loaded_file_gives_the_same_config(tmp_path):
    """Initializers that loading has used up are skipped again by who loads the second file."""
    inputs = keras.Input((5, 4, 2))
    x = K.ReLU()(K.BatchNormalization()(K.Conv2D(3, 3, use_bias=False)(inputs)))
    model = keras.Model(inputs, K.Dense(2)(K.GlobalAveragePooling2D()(x)))
    model = calibrate(quantize_model(model, "w4a4"), np.ones((2, 5, 4, 2), "float32"))
    save_packed(model, tmp_path / "a.keras")
    save_packed(load_packed(tmp_path / "a.keras"), tmp_path / "b.keras")
    first, second = (check_packed(tmp_path / f"{n}.keras")["sha256"] for n in "ab")
    assert first["config.json"] == second["config.json"]
