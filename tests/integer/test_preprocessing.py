"""Raw pixels into a model whose images arrive preprocessed."""

import keras
import numpy as np
import pytest

import keras_lowbit as klb
import tflite_export
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph

K = keras.layers
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 7, 5, 3)).astype("uint8")
MEAN, DEVIATION = np.array([120.0, 110.0, 100.0]), np.array([60.0, 64.0, 70.0])


def calibrated(images, **options):
    inputs = keras.Input((7, 5, 3), name="image")
    x = K.Conv2D(4, 3, padding="same", activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, K.Dense(3, name="head")(K.Flatten()(x)))
    return klb.calibrate(klb.quantize_model(model, "w8a8", **options), images.astype("float32"))


@pytest.mark.parametrize(
    ("real", "preprocessing"),
    [
        (PIXELS * 0.011 - 1.3, (0.011, -1.3)),
        (PIXELS * 0.02, K.Rescaling(0.02)),
        ((PIXELS - MEAN) / DEVIATION, (1 / DEVIATION, -MEAN / DEVIATION)),
        (
            (PIXELS - MEAN) / DEVIATION,
            K.Normalization(mean=MEAN.tolist(), variance=(DEVIATION**2).tolist()),
        ),
    ],
    ids=["numbers", "rescaling", "channels", "normalization"],
)
def test_pixels_give_what_preprocessed_images_give(real, preprocessing):
    if isinstance(preprocessing, K.Normalization):
        preprocessing.build(PIXELS.shape)
    model = calibrated(real)
    graph = integer_graph(model, output_type="float32", preprocessing=preprocessing)
    assert graph.tensors[graph.inputs[0]].dtype == "uint8"
    found = reference.run(graph, {graph.inputs[0]: PIXELS})[graph.outputs[0]]
    wanted = model.predict(real.astype("float32"), verbose=0)
    step = graph.tensors[graph.ops[-1].inputs[0]].scale
    # An input near the middle of two codes may take the other: rarely a step of the output.
    assert np.abs(found - wanted).max() <= 1.01 * step
    assert np.mean(np.abs(found - wanted) > 0.01 * step) < 0.1


def test_an_inverted_normalization_multiplies_by_deviations():
    """0.1 and 0.2 a pixel step, from means 3 and -1."""
    inputs = keras.Input((2, 1, 2), name="image")
    model = keras.Model(inputs, K.Conv2D(2, 1, name="conv", use_bias=False)(inputs))
    model.set_weights([np.eye(2, dtype=np.float32)[None, None]])
    images = np.float32([[3, -1], [28.5, 50]]).reshape(1, 2, 1, 2)
    small = klb.calibrate(klb.quantize_model(model), images)
    layer = K.Normalization(mean=[3.0, -1.0], variance=[0.01, 0.04], invert=True)
    layer.build((None, 2, 1, 2))
    graph = integer_graph(small, preprocessing=layer)
    pixels = np.uint8([[0, 0], [255, 255]]).reshape(1, 2, 1, 2)
    found = reference.run(graph, {graph.inputs[0]: pixels})[graph.outputs[0]]
    # One step of 51 / 255 for each of two roundings.
    np.testing.assert_allclose(found, images, atol=0.2)


def test_a_grid_of_the_pixels_needs_no_operation():
    """input_range (-1, 1): steps of 2 / 255, and each pixel value has a code."""
    model = calibrated(PIXELS / 127.5 - 1, input_range=(-1, 1))
    plain = integer_graph(model, input_type="uint8")
    made = integer_graph(model, preprocessing=(1 / 127.5, -1.0))
    assert [op.kind for op in made] == [op.kind for op in plain]
    results = [reference.run(g, {"image": PIXELS})[g.outputs[0]] for g in (plain, made)]
    np.testing.assert_array_equal(*results)


@pytest.mark.runtime
@pytest.mark.parametrize("input_type", ["uint8", "int8", "float32", None])
def test_the_file_computes_the_reference(input_type):
    model = calibrated(PIXELS * 0.011 - 1.3)
    options = {"input_type": input_type, "preprocessing": (0.011, -1.3)}
    given = PIXELS - 128.0 if input_type == "int8" else PIXELS
    result = tflite_export.convert(model, verify=given, **options)
    assert result.mismatches == 0
    assert result.verification.compared > 1000
    assert klb.freeze(model, **options).inputs[0].dtype == (input_type or "uint8")


@pytest.mark.parametrize(
    "wrong", [(0.0, 1.0), (1.0,), ([1.0, 2.0], 0.0), "minus_one", (float("nan"), 0.0), 3]
)
def test_what_is_no_preprocessing_is_refused(wrong):
    model = calibrated(PIXELS)
    with pytest.raises(ValueError, match=r"preprocessing must be \(scale, offset\)"):
        integer_graph(model, preprocessing=wrong)


def test_a_frozen_model_has_its_preprocessing_already():
    model = klb.freeze(calibrated(PIXELS * 0.02), preprocessing=(0.02, 0.0))
    with pytest.raises(ValueError, match="give preprocessing to freeze"):
        tflite_export.convert(model, preprocessing=(0.02, 0.0))
