"""What pixels and reals are to a model's input: by the range it was made for, or by its grid."""

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit import calibrate, data, freeze, quantize_model
from keras_lowbit.cli import files, measure
from keras_lowbit.cli.pixels import Intake, range_of

PIXELS = np.array([0, 1, 200, 255], "uint8")
F, U, I = np.dtype("float32"), np.dtype("uint8"), np.dtype("int8")  # noqa: E741
UNIT, SIGNED = 1 / 255, 2 / 255


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_integer_inputs_take_pixels_whatever_type_they_come_in(dtype):
    pixels = PIXELS.astype(dtype)
    np.testing.assert_array_equal(Intake(U, 1.0).fitted(pixels), [0, 1, 200, 255])
    codes = Intake(I, 1.0).fitted(pixels)
    np.testing.assert_array_equal(codes, [-128, -127, 72, 127])
    assert codes.dtype == np.int8


@pytest.mark.once
@pytest.mark.parametrize("values", [[0.5, 1.0], [-1.0, 1.0], [0.0, 256.0]])
def test_reals_are_refused_where_pixels_are_taken(values):
    with pytest.raises(ValueError, match=r"pixels 0\.\.255. The images hold float32"):
        Intake(U, 1.0).fitted(np.array(values, "float32"))


@pytest.mark.once
@pytest.mark.parametrize(
    ("intake", "images", "wanted"),
    [
        # A grid of 0..119, calibrated on dark pixels: code = pixel * 255 / 119.
        (Intake(U, 119 / 255), [0, 56, 119, 125], [0, 120, 255, 255]),
        (Intake(I, 119 / 255), [0, 56, 119, 125], [-128, -8, 127, 127]),
        # One of 0..1: pixels are codes, reals have codes, and so have images of 0 and 1 alone.
        (Intake(U, UNIT), [0, 1, 200, 255], [0, 1, 200, 255]),
        (Intake(U, UNIT), [0.0, 0.25, 1.0], [0, 64, 255]),
        (Intake(U, UNIT), [0.0, 1.0], [0, 255]),
        (Intake(U, UNIT), [0, 1], [0, 255]),
        # -1..1 in a file: code 128 is 0.0, half a code beside it.
        (Intake(I, SIGNED, -128 * SIGNED), [0, 1, 200, 255], [-128, -127, 72, 127]),
        # A model that was told of its range is given reals for pixels, and reals as they are.
        (Intake(F, SIGNED, -1.0, given=True), [0, 51, 255], [-1.0, -0.6, 1.0]),
        (Intake(F, SIGNED, -1.0, given=True), [0.0, 1.0], [0.0, 1.0]),
        (Intake(F, UNIT, given=True), [0, 51, 255], [0.0, 0.2, 1.0]),
        (Intake(F, 1.0, given=True), [0, 51, 255], [0, 51, 255]),
        (Intake(F, 16 / 255, given=True), [0, 16], [0, 16]),
        # Nothing is known of a float model.
        (Intake(F), [0, 51, 255], [0, 51, 255]),
    ],
)
def test_images_become_what_the_input_takes(intake, images, wanted):
    whole = all(isinstance(x, int) for x in images)
    got = intake.fitted(np.array(images, "uint8" if whole else "float32"))
    assert got.dtype == intake.dtype
    np.testing.assert_array_equal(got, np.array(wanted, intake.dtype))


@pytest.mark.once
@pytest.mark.parametrize(
    ("intake", "images", "why"),
    [
        (Intake(F, UNIT, given=True), [-1.0, 0.5], r"images of 0\.\.1 \(scale 0.003922\)"),
        (Intake(U, UNIT), [-1.0, 0.5], r"images of 0\.\.1 \(scale 0.003922\)"),
        (Intake(F, 1.0, given=True), [0.0, 0.5], r"takes pixels 0\.\.255"),
        # Those of another normalisation: by ImageNet's means, say.
        (Intake(F, 1.0, given=True), [-2.12, 2.64], r"takes pixels 0\.\.255"),
        (Intake(U, 0.999), [-2.12, 2.64], r"images of 0\.\.254.7 .*a small part"),
        (Intake(U, 0.999), [0.0, 0.3, 1.0], r"images of 0\.\.254.7 .*a small part"),
        (Intake(U, SIGNED, -128 * SIGNED), [0.0, 1.0], r"codes of scale 0.007843.* as uint8"),
        (Intake(U, 16 / 255), [0.0, 255.0], r"images of 0\.\.16 \(scale 0.06275\)"),
    ],
)
def test_images_of_another_range_are_refused_with_the_scale_and_the_way_out(intake, images, why):
    with pytest.raises(ValueError, match=why):
        intake.fitted(np.array(images, "float32"))


@pytest.mark.once
def test_what_images_are_is_decided_once_for_a_data_set():
    pixels = np.array([0, 1, 200, 255], "uint8")
    read = Intake(F, UNIT, given=True).reader(pixels)
    dark = np.array([1], "uint8")  # by itself it might be a real, white
    np.testing.assert_array_equal(read(dark), np.float32([1 / 255]))
    flat = np.float32([100.5])
    np.testing.assert_array_equal(Intake(F, 1.0, given=True).reader(flat * [0, 2])(flat), flat)


def test_a_calibrated_model_takes_what_its_file_takes():
    """No range was given: the grid of images, calibrated on 0..1, tells it."""
    x, _ = pixels_around([40, 128, 215])
    model = calibrate(quantize_model(net([0.15, 0.5, 0.85]), "w8a8"), x.astype("float32") / 255)
    read = Intake.of_model(model)
    assert not read.given
    assert read.dtype == F
    of_file = Intake.of_graph(tflite_export.convert(model).graph)
    np.testing.assert_allclose([read.low, read.top], [of_file.low, of_file.top], atol=1e-6)
    got = measure.keras_answers(model, x)
    np.testing.assert_array_equal(got, measure.keras_answers(model, x.astype("float32") / 255))


def net(centres, first=None):
    """Which of three centres the mean of a 4x4 image of one channel, rescaled, is nearest to.

    Of the lines `z * c - c * c / 2` that of the nearest c is the highest.
    """
    inputs = keras.Input((4, 4, 1))
    x = inputs if first is None else first(inputs)
    x = keras.layers.Conv2D(1, 1, name="conv")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    centres = np.array(centres)
    model.get_layer("conv").set_weights([np.ones((1, 1, 1, 1)), np.zeros(1)])
    model.get_layer("head").set_weights([centres[None], -(centres**2) / 2])
    return model


def pixels_around(centres):
    """90 images `(90, 4, 4, 1)` in three classes, and those classes."""
    y = np.arange(90) % 3
    noise = np.random.default_rng(0).integers(-9, 10, (90, 4, 4, 1))
    return (noise + np.array(centres)[y][:, None, None, None]).astype("uint8"), y


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("first", "input_range", "low", "top"),
    [
        (None, (0, 1), 0.0, 1.0),
        (None, (-1, 1), -1.0, 1.0),
        (keras.layers.Rescaling(1 / 127.5, -1.0), None, 0.0, 255.0),
        (keras.layers.Rescaling(2.0, -1.0), (0, 1), 0.0, 1.0),
    ],
)
def test_models_and_their_files_take_the_same_pixels(first, input_range, low, top):
    pixels, y = pixels_around([30, 120, 240])
    reals = (low + pixels / 255 * (top - low)).astype("float32")
    ends = (low, top) if first is None else (-1.0, 1.0)
    model = net(np.interp([30, 120, 240], [0, 255], ends), first)
    model = calibrate(quantize_model(model, "w8a8", input_range=input_range), reals)
    intake = Intake.of_model(model)
    assert (intake.low, intake.top) == pytest.approx((low, top), abs=1e-6)
    np.testing.assert_allclose(intake.fitted(pixels), reals, rtol=0, atol=1e-6 * top)
    result = tflite_export.convert(model, input_type="uint8")
    assert Intake.of_file(result.content) == Intake.of_graph(result.graph)
    np.testing.assert_array_equal(Intake.of_file(result.content).fitted(pixels), pixels)
    assert measure.keras_accuracy(model, pixels, y) == 1.0
    assert measure.file_accuracy(result.content, pixels, y) == 1.0
    assert measure.keras_accuracy(freeze(model), pixels, y) == 1.0


@pytest.mark.runtime
@pytest.mark.parametrize("input_type", ["float32", "uint8", "int8"])
def test_files_of_a_range_from_0_take_reals_and_pixels(input_type):
    pixels, y = pixels_around([30, 120, 240])
    model = net(np.array([30, 120, 240]) / 255)
    model = calibrate(quantize_model(model, input_range=(0, 1)), pixels / 255)
    content = tflite_export.convert(model, input_type=input_type).content
    assert measure.file_accuracy(content, pixels, y) == 1.0
    assert measure.file_accuracy(content, (pixels / 255).astype("float32"), y) == 1.0


@pytest.mark.once
def test_the_range_of_a_data_set_is_that_of_pixels_or_none():
    digits = data.load("digits")
    reals = data.Dataset(digits.x_train / 255, digits.y_train, digits.x_test / 255, digits.y_test)
    assert range_of(digits) == (0, 255)
    assert range_of(reals) is None


@pytest.fixture
def dark(tmp_path):
    """A folder with a float model without a rescaling, and images that stay below 120."""
    x, y = pixels_around([10, 60, 110])
    np.savez(tmp_path / "dark.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    net([10.0, 60.0, 110.0]).save(tmp_path / "dark.keras")
    return tmp_path


@pytest.mark.runtime
@pytest.mark.parametrize("input_type", ["float32", "uint8", "int8"])
def test_files_of_models_quantized_on_dark_pixels_take_pixels(run, dark, input_type):
    images = f"--data={dark / 'dark.npz'}"
    assert run("quantize", dark / "dark.keras", images, f"--out={dark / 'q.keras'}").code == 0
    assert Intake.of_model(files.load_model(dark / "q.keras")).top == 255
    out = dark / "q.tflite"
    made = run("export", dark / "q.keras", f"--out={out}", f"--input_type={input_type}", images)
    assert (made.code, "0 wrong of" in made.out) == (0, True), made.err
    assert "100.00%" in run("evaluate", out, images).out


@pytest.mark.runtime
def test_files_whose_grid_ends_with_dark_pixels_are_given_codes(run, dark):
    images = np.load(dark / "dark.npz")["x_train"]
    model = calibrate(quantize_model(keras.models.load_model(dark / "dark.keras")), images)
    model.save(dark / "own.keras")
    flags = ("--input_type=uint8", f"--data={dark / 'dark.npz'}")
    out = dark / "own.tflite"
    assert run("export", dark / "own.keras", "--out", out, *flags).code == 0
    assert "100.00%" in run("evaluate", out, flags[1]).out
