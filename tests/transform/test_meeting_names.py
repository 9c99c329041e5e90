"""A nested layer `n/c` and an outer `n_c`: their copies in one flat model keep apart."""

import keras
import numpy as np
from keras import ops

import tflite_export
from keras_lowbit import Scheme, calibrate, quantize_model, walk
from keras_lowbit.transform import correct_biases, fold_batchnorm
from keras_lowbit.tuning import reconstruct, tune_thresholds

K = keras.layers
IMAGES = np.random.default_rng(0).random((32, 6, 6, 4), dtype=np.float32) - 0.5


def net():
    """`n/c`, `n/b`, `n_c`, `n_b` with batch norms of random numbers, and an input `n_c_2`."""
    keras.utils.set_random_seed(0)
    inside = keras.Input((6, 6, 4), name="i")
    nested = keras.Model(
        inside, K.BatchNormalization(name="b")(K.Conv2D(4, 1, name="c")(inside)), name="n"
    )
    image = keras.Input((6, 6, 4), name="n_c_2")
    x = K.BatchNormalization(name="n_b")(K.Conv2D(4, 3, name="n_c")(nested(image)))
    x = K.GlobalAveragePooling2D()(K.ReLU()(x))
    model = keras.Model(image, K.Dense(3, name="d")(x))
    random = np.random.default_rng(1)
    for call in walk.flatten(model).calls:
        if isinstance(call.operation, K.BatchNormalization):
            for weight in call.operation.weights:
                weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return model


def test_each_operation_and_input_has_a_plain_name_of_its_own():
    program = walk.flatten(net())
    assert [c.plain for c in program.calls[:4]] == ["n_c", "n_b", "n_c_3", "n_b_2"]


def test_batch_norms_are_folded_and_answers_stay():
    model = net()
    folded = fold_batchnorm(model)
    assert [layer.name for layer in folded.layers[:3]] == ["n_c_2", "n_c", "n_c_3"]
    # Float32 rounding of products of two kernels.
    np.testing.assert_allclose(
        ops.convert_to_numpy(folded(IMAGES)), ops.convert_to_numpy(model(IMAGES)), atol=1e-5
    )


def test_models_are_compared_layer_by_layer():
    model = net()
    small = calibrate(quantize_model(model, "w4a4"), IMAGES)
    for twin, layer in (("n_c", model.get_layer("n").get_layer("c")), ("n_c_3", None)):
        layer = layer or model.get_layer("n_c")
        assert small.get_layer(twin).kernel.shape == layer.kernel.shape
    correct_biases(small, model, IMAGES)
    assert len(reconstruct(small, model, IMAGES, steps=2).blocks) >= 2
    assert tflite_export.convert(small, verify=IMAGES[:4]).mismatches == 0


def test_thresholds_are_tuned():
    folded = fold_batchnorm(net())
    small = quantize_model(folded, Scheme(8, 8, kernel="threshold", activation="threshold"))
    calibrate(small, IMAGES, method="minmax")
    tuning = tune_thresholds(small, folded, IMAGES, epochs=1)
    assert 0 < tuning.after <= tuning.before
    assert tflite_export.convert(small, verify=IMAGES[:4]).mismatches == 0
