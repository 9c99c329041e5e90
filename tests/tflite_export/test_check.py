"""What `check` says of a model and of a choice of arguments is what `convert` says of both."""

import itertools

import keras
import numpy as np
import pytest

from keras_lowbit import Scheme, calibrate, freeze, quantize_model
from tflite_export import check, convert, targets

pytestmark = [pytest.mark.runtime, pytest.mark.once]

K = keras.layers
SHAPE = (6, 6, 4)
TYPES = ("float32", "int8", "uint8")
SCHEME = Scheme(4, 4, ends_bits=None)
ARGUMENTS = [
    {"target": target, "weights": weights, "input_type": input_type, "output_type": output_type}
    for target, weights, input_type, output_type in itertools.product(
        targets.TARGETS, ("int8", "int4", "int4_all"), (None, *TYPES), TYPES
    )
]


def plain():
    """Kernels that each choice of `weights` stores otherwise: 3x3, pointwise and dense."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, activation="relu", name="wide")(inputs)
    x = K.Conv2D(4, 1, activation="relu", name="point")(x)
    return keras.Model(inputs, K.Dense(3, name="logits")(K.GlobalAveragePooling2D()(x)))


def shifted():
    """A grid of pixels without a code for 0.0, and a second input that has one."""
    first, second = keras.Input(SHAPE, name="pixels"), keras.Input(SHAPE, name="reals")
    x = K.Conv2D(4, 1, name="a")(K.Rescaling(1 / 127.5, -1.0)(first))
    return keras.Model([first, second], K.Add(name="sum")([x, K.Conv2D(4, 1, name="b")(second)]))


def of_rank_five():
    """Outputs and operations that the Edge TPU leaves to the CPU."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, dilation_rate=(2, 1), name="dilated")(inputs)
    return keras.Model(inputs, K.Reshape((2, 2, 2, 4), name="folded")(x))


def images_for(model):
    random = np.random.default_rng(0)
    return [255 * random.random((4, *x.shape[1:]), np.float32) for x in model.inputs]


def trained(model):
    return calibrate(quantize_model(model, SCHEME), images_for(model))


def refused(model, arguments):
    """The objection of `convert`, whole; empty where it writes a file."""
    try:
        convert(model, **arguments)
    except ValueError as objection:  # NotExportable, or what a frozen model is not
        return str(objection)
    return ""


def said(found, target):
    """Objections of a target as `convert` lists them."""
    listed = "\n  ".join(found)
    place = targets.find(target)
    return f"{place.name} ({place.runtime}) has {len(found)} objections:\n  {listed}"


@pytest.mark.parametrize("model_of", [plain, shifted, of_rank_five])
def test_check_says_what_convert_says_of_the_same_arguments(model_of):
    model = model_of()
    ready, fresh = trained(model), quantize_model(model, SCHEME)
    objections = set()
    for arguments in ARGUMENTS:
        found, why = check(ready, **arguments), refused(ready, arguments)
        assert check(fresh, **arguments) == found, "calibration changes nothing of it"
        objections.update(found)
        if why:
            assert why in (found[0], said(found, arguments["target"])), arguments
        else:
            assert found == [], arguments
    assert objections


def test_the_containers_of_kernels_are_those_of_a_check():
    model = quantize_model(plain(), SCHEME)
    asked = {w: check(model, "coral", weights=w) for w in ("int8", "int4", "int4_all")}
    named = {w: [line.split(" (")[0] for line in lines] for w, lines in asked.items()}
    assert named == {
        "int8": [],
        "int4": ["point", "logits"],
        "int4_all": ["wide", "point", "logits"],
    }
    # The old runtime loads int4 convolutions, and no int4 dense layers.
    assert [line.split(" (")[0] for line in check(model, "builtin", weights="int4_all")] == [
        "point",
        "logits",
    ]


def test_every_input_and_output_is_heard():
    first, second = keras.Input(SHAPE, name="first"), keras.Input(SHAPE, name="second")
    x, y = (K.Rescaling(1 / 127.5, -1.0)(x) for x in (first, second))
    model = keras.Model([first, second], K.Conv2D(2, 1)(K.Concatenate()([x, y])))
    found = check(model, input_type="float32")
    assert [line.split(":")[0] for line in found] == ["Input first", "Input second"]
    assert all("Use input_type='uint8' (raw pixels) or 'int8'" in line for line in found)
    assert check(model) == check(model, input_type="uint8") == []


def test_outputs_without_a_grid_are_named_before_training():
    model = quantize_model(plain(), "w4a4")
    inside = [model.get_layer(name).output for name in ("wide", "point")]
    found = check(keras.Model(model.input, inside))
    assert [line.split(":")[0] for line in found] == [
        "Output wide has no grid",
        "Output point has no grid",
    ]


def test_an_end_is_heard_beside_a_layer_that_is_refused():
    inputs = keras.Input(SHAPE, name="image")
    x = K.Conv2D(4, 3)(K.Rescaling(1 / 127.5, -1.0)(inputs))
    model = keras.Model(inputs, K.Conv2D(2, 1)(K.LayerNormalization(name="strange")(x)))
    lowering, end = check(model, input_type="float32")
    assert lowering.startswith("strange (LayerNormalization) has no integer form")
    assert end.startswith("Input image: its grid stands")


def test_an_input_behind_a_refused_layer_is_not_said_to_be_unread():
    inputs = keras.Input(SHAPE, name="image")
    model = keras.Model(inputs, K.Conv2D(2, 1)(K.LayerNormalization(name="strange")(inputs)))
    assert [line.split(" ")[0] for line in check(model)] == ["strange"]


@pytest.mark.parametrize(
    "options", [{}, {"weights": "int4", "input_type": "uint8", "output_type": "int8"}]
)
def test_a_frozen_model_is_checked_for_what_it_was_frozen_with(options):
    frozen = freeze(trained(plain()), **options)
    for arguments in ARGUMENTS:
        found, why = check(frozen, **arguments), refused(frozen, arguments)
        assert why in ("".join(found), said(found, arguments["target"])), arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int2"}, r"weights must be one of .*'int4_all'.*Got 'int2'"),
        ({"input_type": "int4"}, "input_type must be one of"),
        ({"output_type": "int16"}, "output_type must be one of"),
    ],
)
@pytest.mark.parametrize("model_of", [plain, lambda: freeze(trained(plain()))])
def test_arguments_that_mean_nothing_are_refused(model_of, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(model_of(), **arguments)
