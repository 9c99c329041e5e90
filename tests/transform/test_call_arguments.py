"""What a call got beside its tensors is computed, or refused by name: never left out."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import calibrate, quantize_model
from tflite_export import NotExportable, check, convert

pytestmark = pytest.mark.runtime

K = keras.layers
SIDE = 6  # height, width and channels: shapes that only their place tells apart
ROWS = np.linspace(0.5, 3.0, SIDE, dtype="float32").reshape(SIDE, 1)
PIXELS = np.full((1, SIDE, SIDE, SIDE), 3.0, "float32")
OF_EACH = np.repeat(PIXELS, 12, axis=0)
MASK = np.array([[True, True, False, True]])


def images(count=12):
    shape = (count, SIDE + 2, SIDE + 2, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype("float32")


def net(between, head=lambda y: K.Dense(4)(K.GlobalAveragePooling2D()(y))):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE + 2, SIDE + 2, 3))
    x = K.Conv2D(SIDE, 3)(K.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, head(between(x)))


def trained(model):
    return calibrate(quantize_model(model, "w8a8"), images())


REFUSED = {
    "a constant in Add": (lambda y: K.Add(name="odd")([y, PIXELS]), r"odd \(Add\).*x \+ constant"),
    "a constant in an Add of three": (
        lambda y: K.Add(name="odd")([y, K.ReLU()(y), PIXELS]),
        r"odd \(Add\)",
    ),
    "a constant in Multiply": (lambda y: K.Multiply(name="odd")([y, PIXELS]), r"odd \(Multiply\)"),
    "a constant in Concatenate": (
        lambda y: K.Concatenate(name="odd")([y, OF_EACH]),
        r"odd \(Concatenate\).*of tensors of the model alone",
    ),
    "a constant in ops.concatenate": (
        lambda y: ops.concatenate([y, OF_EACH], axis=-1),
        r"\(Concatenate\)",
    ),
    "a sum a row": (lambda y: y + ROWS, r"\(Add\) has no integer form"),
    "a factor a row": (lambda y: y * ROWS, r"\(Multiply\) has no integer form"),
    "a Rescaling a row": (lambda y: K.Rescaling(ROWS, name="odd")(y), r"odd \(Rescaling\)"),
    "an index": (lambda y: K.Reshape((SIDE, 1, SIDE))(y[:, 0]), r"a slice of one, such as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_compute_of_a_call_is_refused_by_name(case):
    between, message = REFUSED[case]
    model = net(between)
    assert any(re.search(message, found) for found in check(model)), check(model)
    with pytest.raises(NotExportable, match=message):
        convert(trained(model))


def test_a_maximum_that_begins_somewhere_is_refused():
    model = net(lambda y: y, lambda y: K.Dense(4)(ops.max(y, axis=(1, 2), initial=1.0)))
    with pytest.raises(NotExportable, match=r"a maximum with initial=1.0 .* Leave initial out"):
        convert(trained(model))


# Keras hands the mask on to the layer behind.
@pytest.mark.filterwarnings("ignore:.*passed an input with a mask attached:UserWarning")
def test_a_softmax_with_a_mask_is_refused():
    def head(y):
        logits = K.Dense(4)(K.GlobalAveragePooling2D()(y))
        return K.Softmax(name="odd")(logits, mask=MASK)

    with pytest.raises(NotExportable, match=r"odd \(Softmax\).*one tensor and no mask"):
        convert(trained(net(lambda y: y, head)))


@pytest.mark.parametrize(
    "case", ["a constant in Add", "a constant in Multiply", "a Rescaling a row", "a sum a row"]
)
def test_the_model_that_trains_computes_it(case):
    model = net(REFUSED[case][0])
    quantized = trained(model)
    wanted, found = (m.predict(images(), verbose=0) for m in (model, quantized))
    # 8 bits, of a range to which constants as large as what is there are added.
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.ptp(wanted))


EXPORTED = {
    "a mean over width and height": lambda y: K.Dense(4)(ops.mean(y, axis=(2, 1))),
    "a maximum over width and height": lambda y: K.Dense(4)(ops.max(y, axis=(2, 1))),
    "a minus": lambda y: K.Dense(4)(K.GlobalAveragePooling2D()(K.Add()([y, -K.ReLU()(y)]))),
    "another axis": lambda y: K.Dense(4)(
        ops.squeeze(ops.expand_dims(K.GlobalAveragePooling2D()(y), 1), 1)
    ),
    "a sum a channel": lambda y: K.Dense(4)(K.GlobalAveragePooling2D()(y + ROWS.reshape(SIDE))),
    "a factor a channel": lambda y: K.Dense(4)(
        K.GlobalAveragePooling2D()(y * ROWS.reshape(1, 1, 1, SIDE))
    ),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_what_a_file_can_compute_of_a_call_it_does(case):
    model = net(lambda y: y, EXPORTED[case])
    quantized = trained(model)
    result = convert(quantized, verify=images())
    assert result.mismatches == 0
    wanted = model.predict(images(), verbose=0)
    # Two grids of 8 bits at the least lie in between.
    for found in (quantized, result.frozen):
        np.testing.assert_allclose(
            found.predict(images(), verbose=0), wanted, atol=0.03 * np.ptp(wanted)
        )


@pytest.mark.parametrize("offset", [0.0, -1.0])
def test_rescaled_images_are_an_output_on_their_grid(offset):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE + 2, SIDE + 2, 3))
    shown = K.Rescaling(1 / 255, offset)(inputs)
    logits = K.Dense(4)(K.GlobalAveragePooling2D()(K.Conv2D(SIDE, 3)(shown)))
    quantized = trained(keras.Model(inputs, [shown, logits]))
    result = convert(quantized, input_type="uint8", verify=images())
    assert result.mismatches == 0
    pixels = images().astype("uint8")
    found, _ = result.frozen.predict(pixels, verbose=0)
    # Each pixel value has a code of its own; float32.
    np.testing.assert_allclose(found, pixels / 255 + offset, atol=1e-6)
