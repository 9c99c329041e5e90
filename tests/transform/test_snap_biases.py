"""Biases on the file's own units: the Keras model then computes what its file computes."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb
import tflite_export
from keras_lowbit import walk
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.transform.snap_biases import snap_biases

K = keras.layers


def nudged(model, by=0.37):
    """The model with every bias and beta moved, as a training step would."""
    random = np.random.default_rng(1)
    for layer in model.layers:
        for variable in (getattr(layer, "bias", None), getattr(layer, "beta", None)):
            if variable is not None:
                value = ops.convert_to_numpy(variable)
                variable.assign(value + by * random.standard_normal(value.shape))
    return model


def hostile(norm):
    random = np.random.default_rng(2)
    channels = norm.gamma.shape[0]
    norm.gamma.assign(random.uniform(0.2, 1, channels) * np.where(np.arange(channels) % 2, 1, -1))
    norm.moving_mean.assign(random.normal(0, 1, channels))
    norm.moving_variance.assign(random.uniform(0.1, 2, channels))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3)).astype("float32")


@pytest.fixture
def net(images):
    inputs = keras.Input((9, 9, 3))
    x = K.Rescaling(1 / 255)(inputs)
    x = K.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = K.ReLU()(K.BatchNormalization(name="stem_bn")(x))
    x = K.SeparableConv2D(8, 3, activation="relu", name="separable")(x)
    x = K.Conv2D(8, 1, name="point")(x)
    x = K.ReLU()(K.BatchNormalization(center=False, name="point_bn")(x))
    outputs = K.Dense(4, name="head")(K.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    hostile(model.get_layer("stem_bn"))
    hostile_gain = model.get_layer("point_bn")
    hostile_gain.gamma.assign(np.linspace(-1, 1, 8))
    return nudged(klb.calibrate(klb.quantize_model(model, "w8a8"), images))


def wrong_codes(model, images):
    """Codes of quantized tensors in Keras that differ from the integers of the graph."""
    graph = integer_graph(model, input_type="uint8")
    computed = reference.run(graph, {graph.inputs[0]: images.astype("uint8")})
    wrong = 0
    for name in ("re_lu", "separable", "re_lu_1", "head"):
        pair = model.get_layer(f"{name}_quantize")
        codes = keras.Model(model.inputs, pair.output[0]).predict(images, verbose=0)
        # The output has the last layer's name, so the codes in front of it moved aside.
        name = f"{name}_int8" if name in graph.outputs else name
        tensor = graph.tensors[name]
        wrong += np.count_nonzero(codes != computed[name].astype(int) - tensor.zero_point)
    return wrong


def snapped(kernel_scales, bias):
    """The bias of a dense layer afterwards, between grids of steps 1/4."""
    inputs = keras.Input((2,))
    pair = klb.layers.Quantize("lsq", signed=False)(inputs)
    layer = klb.layers.QuantizedDense(len(bias))
    made = klb.layers.Quantize("lsq")(layer(pair))
    model = keras.Model(inputs, klb.layers.Dequantize()(made))
    for quantizer in (model.layers[1].quantizer, model.layers[3].quantizer):
        quantizer.take_scale(np.float32(0.25))
    layer.kernel.assign(np.outer([1.0, -0.5], np.ones(len(bias))))
    layer.kernel_quantizer.take_scale(np.float32(kernel_scales))
    layer.bias.assign(np.float32(bias))
    snap_biases(model)
    return np.array(ops.convert_to_numpy(layer.bias))


def test_a_bias_becomes_a_whole_number_of_units():
    """Scales 1/4 of the input and 1/8 of the kernel: unit 1/32; 0.30 is 9.6 units, so 10."""
    np.testing.assert_array_equal(snapped([0.125], [0.30]), np.float32([10 / 32]))


def test_a_bias_without_a_nearest_code_stays():
    """Channel 1 saturates: 512 steps of the output a unit, of which the file holds 255.5.

    Its bias of 300 is 2.3 units of 128, code 2, which the file reads as 2 * 63.9. Channel 2 is
    dead: its unit is the output's 1/4, and 2^29 more than the 2^30 of them that a file holds.
    """
    found = snapped([0.125, 512.0, 2.0**-40], [0.30, 300.0, 2.0**29])
    np.testing.assert_array_equal(found, np.float32([10 / 32, 300.0, 2.0**29]))


def test_a_bias_that_two_batch_norms_read_stays():
    """Each rounds it by a gain of its own. `quantize_model` puts a grid there; by hand one may not.

    Both norms are new ones, so that both ask for the same shift and only their number forbids it.
    """
    inputs = keras.Input((2, 2, 3))
    x = klb.layers.Quantize("lsq")(inputs)
    x = klb.layers.QuantizedConv2D(4, 1, bias_initializer="ones", name="conv")(x)
    outputs = [
        klb.layers.Dequantize()(klb.layers.Quantize("lsq")(K.BatchNormalization(name=name)(x)))
        for name in ("first", "second")
    ]
    model = keras.Model(inputs, outputs)
    klb.calibrate(model, np.random.default_rng(0).random((4, 2, 2, 3)).astype("float32"))
    snap_biases(model)
    for layer, name in (("conv", "bias"), ("first", "beta"), ("second", "beta")):
        found = ops.convert_to_numpy(getattr(model.get_layer(layer), name))
        np.testing.assert_array_equal(found, np.full(4, float(name == "bias"), "float32"))
    assert largest_shift(model) > 0.1


def test_codes_in_keras_become_those_of_the_file(net, images):
    before = wrong_codes(net, images)
    after = wrong_codes(snap_biases(net), images)
    # 34,464 codes; float32 noise moves about one in 10^5.
    assert before > 10
    assert after <= 1


@pytest.mark.runtime
def test_the_file_stays_as_it_is(net):
    before = tflite_export.convert(net).content
    assert tflite_export.convert(snap_biases(net)).content == before


def test_snapping_twice_is_snapping_once(net):
    once = [np.array(w) for w in snap_biases(net).get_weights()]
    for first, second in zip(once, snap_biases(net).get_weights(), strict=True):
        # A sum of a bias and a mean, each rounded to float32.
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


def test_only_biases_move(net):
    names = [v.path for v in net.variables]
    before = [np.array(w) for w in net.get_weights()]
    after = snap_biases(net).get_weights()
    moved = {
        name.split("/")[-2] + "/" + name.split("/")[-1]
        for name, a, b in zip(names, before, after, strict=True)
        if not np.array_equal(a, b)
    }
    # `point_bn` has no beta, so the bias in front of it moves.
    assert moved == {"stem_bn/beta", "separable/bias", "point/bias", "head/bias"}


def test_calibrated_and_corrected_models_are_snapped(images):
    inputs = keras.Input((9, 9, 3))
    x = K.Conv2D(4, 3, bias_initializer=keras.initializers.Constant(0.123))(inputs)
    model = keras.Model(inputs, K.Flatten()(x))
    made = klb.calibrate(klb.quantize_model(model, "w8a8"), images)
    for step in (lambda: None, lambda: klb.correct_biases(made, model, images)):
        step()
        before = [np.array(w) for w in made.get_weights()]
        for a, b in zip(before, snap_biases(made).get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # float32 sums


def test_a_layer_called_on_two_grids_keeps_its_bias(images):
    inputs = keras.Input((9, 9, 3))
    shared = K.Conv2D(3, 3, padding="same", bias_initializer="ones", name="shared")
    x = shared(K.ReLU()(shared(inputs)))
    model = klb.quantize_model(keras.Model(inputs, x), "w8a8")
    klb.calibrate(model, images)
    layer = model.get_layer("shared")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.bias), np.ones(3, "float32"))


def test_a_model_without_an_integer_form_stays_as_it_is(images):
    inputs = keras.Input((9, 9, 3))
    x = K.Activation("tanh")(K.Conv2D(4, 3, name="conv")(inputs))
    made = klb.quantize_model(keras.Model(inputs, K.Conv2D(2, 1)(x)), "w8a8")
    nudged(klb.calibrate(made, images))
    before = ops.convert_to_numpy(made.get_layer("conv").bias)
    snap_biases(made)
    np.testing.assert_array_equal(ops.convert_to_numpy(made.get_layer("conv").bias), before)


def test_batch_norms_without_a_product_in_front_are_snapped_too(images):
    """Pre-activation: a norm behind a sum is a product of its own."""
    inputs = keras.Input((9, 9, 3))
    x = K.Conv2D(8, 3, padding="same")(K.Rescaling(1 / 255)(inputs))
    x = K.Add()([x, K.Conv2D(8, 3, padding="same")(K.ReLU()(x))])
    x = K.Conv2D(8, 3)(K.ReLU()(K.BatchNormalization(name="behind_sum")(x)))
    model = keras.Model(inputs, K.Dense(4)(K.GlobalAveragePooling2D()(x)))
    hostile(model.get_layer("behind_sum"))
    model = nudged(klb.calibrate(klb.quantize_model(model, "w8a8"), images))

    def off():
        lowering = Lowering(walk.flatten(model), 1, "int8")
        lowering.run()
        (biases,) = lowering.emitter.biases["behind_sum"]
        return np.abs(biases.reals / biases.unit - biases.codes).max()

    # Not half a unit: the code of a copy is chosen such that its bias is nearly whole.
    assert 1e-2 < off() < 0.5
    snap_biases(model)
    assert off() < 2e-3  # float32, and another code for the copy


def test_weights_on_the_border_between_codes_leave_it():
    inputs = keras.Input((4,))
    model = klb.quantize_model(keras.Model(inputs, K.Dense(3, name="head")(inputs)), "w8a8")
    klb.calibrate(model, np.random.default_rng(0).uniform(0, 1, (8, 4)).astype("float32"))
    head = model.get_layer("head")
    scale = ops.convert_to_numpy(head.kernel_quantizer.scale).reshape(-1)
    ratio = np.array(
        [[2.5, -3.5, 0.25], [2.4998, 7.0, 127.5], [-2.50001, 1.50001, -0.5], [0, 1, 2]]
    )
    head.kernel.assign((ratio * scale).astype("float32"))
    before, _ = head.kernel_quantizer.to_codes(ops.convert_to_tensor(head.kernel))
    snap_biases(model)
    after, _ = head.kernel_quantizer.to_codes(ops.convert_to_tensor(head.kernel))
    np.testing.assert_array_equal(ops.convert_to_numpy(after), ops.convert_to_numpy(before))
    moved = ops.convert_to_numpy(head.kernel).astype("float64") / scale
    # 2.4998 is far enough, and so is all that is no half.
    near = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    # In codes: float32 knows a ratio of 128 to 1e-5, and two of the ratios lie 1e-5 off the border.
    np.testing.assert_allclose(np.abs(moved - ratio)[near], 1e-4, atol=3e-5)
    np.testing.assert_allclose(moved[~near], ratio[~near], atol=3e-5)
    beside = moved - ops.convert_to_numpy(after)
    assert np.all(np.abs(np.abs(beside) - 0.5) > 5e-5)


CONSTANTS = {
    "own hard sigmoid": lambda x: x,
    "hard sigmoid": lambda x: K.Activation("hard_sigmoid")(x),
    "constants": lambda x: 2.0 - (x + 1.5) / 3.0,
    "factor behind a clip": lambda x: K.ReLU(6.0)(x + 3.0) * (1.0 / 6.0),
    "norm": lambda x: K.BatchNormalization()(x * 0.3) * np.linspace(-1, 2, 8).astype("float32"),
    "norm without a shift": lambda x: K.BatchNormalization(center=False)(x * 0.3) + 0.2,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_behind_a_product_count(name, images):
    """Every bias that is added in all is then a whole number of units of the file."""
    inputs = keras.Input((9, 9, 3))
    x = K.Conv2D(8, 3, name="stem")(K.Rescaling(1 / 255)(inputs))
    own = "hard_sigmoid" if name.startswith("own") else None
    x = CONSTANTS[name](K.Conv2D(8, 1, name="gate", activation=own)(x))
    model = keras.Model(inputs, K.Dense(4, name="head")(K.GlobalAveragePooling2D()(x)))
    model = nudged(klb.calibrate(klb.quantize_model(model, "w8a8"), images))
    assert largest_shift(model) > 0.2
    snap_biases(model)
    # Variables are float32.
    assert largest_shift(model) < 1e-2


def largest_shift(model):
    """How far biases are from whole numbers of units, in units."""
    lowering = Lowering(walk.flatten(model), 1, "int8")
    lowering.run()
    found = [b for biases in lowering.emitter.biases.values() for b in biases]
    return max(np.abs((b.reals / b.unit) - b.codes).max() for b in found)
