import types

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit import data
from keras_lowbit.cli import measure
from keras_lowbit.cli.pixels import Intake
from tflite_export import runtime


@pytest.mark.once
def test_wilson_interval_by_hand():
    # z = 2: p = 0.5, z^2/n = 1: (0.5 + 0.5 -+ 2 sqrt(0.0625 + 0.0625)) / 2 = 0.5 -+ 0.353553
    low, high = measure.wilson(2, 4, z=2.0)
    assert (low, high) == pytest.approx((0.1464466, 0.8535534))
    # All right: the upper end is 1 and the lower one 1 / (1 + z^2 / n).
    assert measure.wilson(10, 10, z=2.0) == pytest.approx([1 / 1.4, 1.0])
    for n in range(1, 60):
        assert measure.wilson(0, n)[0] >= 0  # and no negative zero in a table
        assert "-" not in measure.shown({"accuracy": 0.0, "interval": measure.wilson(0, n)})
        assert measure.wilson(n, n)[1] <= 1


def test_answers_of_a_keras_model_are_those_of_one_predict(backend):
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten()])
    x = np.random.default_rng(0).integers(0, 256, (23, 2, 2, 1)).astype("uint8")
    expected = x.reshape(23, 4).argmax(-1)
    np.testing.assert_array_equal(measure.keras_answers(model, x, batch_size=5), expected)
    assert measure.keras_accuracy(model, x, expected) == 1.0


def test_one_output_names_no_class():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"two outputs or more.* shape \(3, 1\): compare them"):
        measure.keras_answers(model, np.ones((3, 2)))


def test_classes_are_those_of_one_vector_an_image():
    inputs = keras.Input((4, 4, 1))
    flat = keras.layers.Flatten()(inputs)
    one, other = keras.layers.Dense(3)(flat), keras.layers.Dense(5)(flat)
    assert measure.output_classes(keras.Model(inputs, one), "m.keras") == 3
    for outputs, shapes in (
        ([one, other], r"\(None, 3\) and \(None, 5\)"),
        ({"a": one, "b": other}, r"\(None, 3\) and \(None, 5\)"),
        (keras.layers.Conv2D(3, 1)(inputs), r"\(None, 4, 4, 3\)"),
        (keras.ops.max(one, axis=-1), r"\(None,\)"),
    ):
        said = rf"m\.keras gives {shapes}; accuracy is of one output \(batch, classes\)\. Give"
        with pytest.raises(ValueError, match=said):
            measure.output_classes(keras.Model(inputs, outputs), "m.keras")


@pytest.mark.parametrize("shapes", [{}, {"a": ()}, {"a": (1, 8, 8, 3)}, {"a": (1, 3), "b": (1, 3)}])
def test_classes_of_a_file_are_those_of_one_vector_an_image(shapes):
    session = types.SimpleNamespace(output_shapes=shapes)
    with pytest.raises(ValueError, match=r"m\.tflite gives .*; accuracy is of one output \(batch"):
        measure.file_classes(session, "m.tflite")
    assert measure.file_classes(types.SimpleNamespace(output_shapes={"a": (1, 3)}), "") == 3


@pytest.mark.parametrize(("outputs", "classes"), [(1, 1), (1, 2)])
def test_one_class_is_not_told_from_another(outputs, classes):
    dataset = types.SimpleNamespace(name="d.npz", num_classes=classes)
    with pytest.raises(ValueError, match=rf"m has 1 output and d\.npz {classes} classes; accuracy"):
        measure.check_classes("m", outputs, dataset)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 22, 250])
def test_a_keras_model_sees_batches_of_one_size_only(backend, batch_size):
    sizes = []

    class Watched(keras.layers.Layer):
        def call(self, x):
            sizes.append(x.shape[0])
            return x

    model = keras.Sequential([keras.Input((3,)), Watched()])
    x = np.eye(3, dtype="float32")[np.arange(23) % 3]
    del sizes[:]
    np.testing.assert_array_equal(measure.keras_answers(model, x, batch_size), np.arange(23) % 3)
    seen = set(sizes) - {None}
    assert len(seen) == 1
    assert seen.pop() <= batch_size


@pytest.mark.runtime
@pytest.mark.parametrize("input_type", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_file_gives_the_same_answers_for_every_input_type_and_batch(made, input_type, batch):
    model = keras.models.load_model(made / "w4a4.keras", compile=False)
    x = data.load("digits").x_test[:33]

    def answers(**options):
        content = tflite_export.convert(model, **options).content
        return measure.file_answers(runtime.Session(content), x, intake=Intake.of_file(content))

    wanted = answers()
    np.testing.assert_array_equal(answers(input_type=input_type, batch=batch), wanted)
    assert len(set(wanted.tolist())) > 1


@pytest.mark.runtime
def test_images_of_another_size_are_refused(made):
    content = (made / "w4a4.tflite").read_bytes()
    session, images = runtime.Session(content), np.zeros((2, 9, 9, 1), "uint8")
    with pytest.raises(ValueError, match="The images have 9x9x1 pixels; the file takes 8x8x1"):
        measure.file_answers(session, images, intake=Intake.of_file(content))
