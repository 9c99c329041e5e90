"""Products of two tensors, gates, clips at any limit and constants become integers."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import NotExportable, calibrate, quantize_model, quantizers
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.layers import Quantize, QuantizedDense
from tests.gradients import gradient
from tests.transform.test_quantize_model import assert_close, assert_same_integers, grids

K = keras.layers
SHAPE = (6, 5, 3)


def images(count=16):
    return np.random.default_rng(0).uniform(0, 1, (count, *SHAPE)).astype("float32")


def between(block, **first):
    """A model with `block` between a convolution and a dense layer, the same at each call."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE, name="image")
    x = block(K.Conv2D(4, 3, name="stem", **first)(inputs))
    if len(x.shape) == 4:
        x = K.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, K.Dense(2, name="head")(x))


def kinds(quantized):
    """Operations of the integer graph, borders left out."""
    return [op.kind for op in integer_graph(quantized).ops][1:-1]


def last_gain(quantized):
    """Codes at the output that one code in every input of the last dense layer can make."""
    graph = integer_graph(quantized)
    (head,) = (op for op in graph.ops if op.kind == "fully_connected")
    step = graph.tensors[head.inputs[0]].scale / graph.tensors[head.output].scale
    return float((np.abs(head.kernel.astype("float64")).sum(0) * head.kernel_scale).max() * step)


def squeezed(gate):
    """Squeeze-and-excite."""

    def block(x):
        y = K.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
        y = K.Conv2D(2, 1, activation="relu", name="reduce")(y)
        y = K.Conv2D(4, 1, activation=gate, name="expand")(y)
        return K.Multiply(name="excite")([x, y])

    return block


def by_hand(x):
    """`hard_sigmoid` as Keras' own MobileNetV3 writes it."""
    return K.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


BLOCKS = {
    "squeezed by a sigmoid": squeezed("sigmoid"),
    "squeezed by a hard sigmoid": squeezed("hard_sigmoid"),
    "silu": K.Activation("silu"),
    "ops.silu": ops.silu,
    "hard_silu": K.Activation("hard_silu"),
    "ops.hard_silu": ops.hard_silu,
    "sigmoid": K.Activation("sigmoid"),
    "softmax": K.Softmax(),
    "hard_sigmoid": K.Activation("hard_sigmoid"),
    "ops.hard_sigmoid": ops.hard_sigmoid,
    "hard sigmoid by hand": by_hand,
    "square": lambda x: ops.multiply(x, x),
    "of three": lambda x: K.Multiply()([x, K.Activation("sigmoid")(x), K.ReLU()(x)]),
    "limited": K.ReLU(0.4),
    "constants": lambda x: 2.0 - (x + 1.5) / 2.0,
    "a constant a channel": lambda x: x * np.float32([1, -2, 3, 0.5]) + np.float32([[0, 1, 2, 3]]),
    "scaled behind a sum": lambda x: K.Add()([x, K.ReLU()(x)]) * 0.3,
    "rescaled": K.Rescaling(0.5, -1.0),
    "larger": K.UpSampling2D((2, 3)),
    "leaky": K.LeakyReLU(0.1),
    "leaky relu": K.ReLU(negative_slope=0.25),
    "ops.leaky_relu": ops.leaky_relu,
    "leaky sum": lambda x: K.LeakyReLU()(K.Add()([x, K.ReLU()(x)])),
    "gated sum": lambda x: K.Activation("silu")(K.Add()([x, K.ReLU()(x)])),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_8_bit_model_is_near_and_its_integers_are_those_of_the_file(name):
    quantized = assert_close(between(BLOCKS[name]), data=images())
    # A sum is rounded half up where training rounds half to even, and so are both parts of a leak:
    # up to one value in ten of these small images lies at such a tie. Their means then differ by
    # up to one code, and the dense layer behind adds its four channels.
    ties = "sum" in name or "leaky" in name
    assert_same_integers(quantized, images(), codes=1 + last_gain(quantized) if ties else 1)


@pytest.mark.runtime
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_code_of_the_file_differs(name, scheme):
    model = between(BLOCKS[name])
    assert tflite_export.check(model) == []
    result = tflite_export.convert(
        calibrate(quantize_model(model, scheme), images()), verify=images()
    )
    assert result.mismatches == 0
    elsewhere = ("softmax", "resize_nearest")  # exact in built-in kernels
    kernels = {row["kernels"] for row in result.report["ops"] if row["op"] not in elsewhere}
    assert kernels == {"XNNPACK"}


OWN = {name: K.Activation(name) for name in ("silu", "hard_silu", "sigmoid", "hard_sigmoid")}
OWN |= {"leaky_relu": K.LeakyReLU(0.2), K.LeakyReLU(0.3): K.LeakyReLU(0.3)}
OWN |= {K.ReLU(0.4): K.ReLU(0.4), K.ReLU(): K.ReLU()}


@pytest.mark.parametrize("activation", OWN, ids=str)
def test_a_layer_s_own_activation_is_that_behind_it(activation):
    own = between(lambda x: x, activation=activation)
    own = calibrate(quantize_model(own, "w8a8"), images())
    behind = calibrate(quantize_model(between(OWN[activation]), "w8a8"), images())
    behind.set_weights(own.get_weights())
    want = own.predict(images(), verbose=0)
    np.testing.assert_array_equal(behind.predict(images(), verbose=0), want)
    assert kinds(own) == kinds(behind)


def test_a_gate_lies_on_the_grid_of_its_range():
    """sigmoid in 256ths, as the runtime's table; hard_sigmoid in 255ths, so that 1.0 is a code."""
    for name, scale in (("silu", 1 / 256), ("hard_silu", 1 / 255)):
        quantized = calibrate(quantize_model(between(K.Activation(name)), "w4a4"), images())
        gates = [x for x in quantized.layers if x.name.endswith("_gate_quantize")]
        (gate,) = gates
        grid = gate.quantizer.grid()
        assert isinstance(gate.quantizer, quantizers.Affine)
        assert (grid.lo, grid.hi) == (0, 255)
        np.testing.assert_allclose(float(grid.scale), scale, rtol=1e-7)  # float32


def test_a_hard_sigmoid_behind_a_product_costs_no_operation():
    model = between(K.Activation("hard_sigmoid"))
    quantized = calibrate(quantize_model(model, "w8a8"), images())
    assert kinds(quantized) == ["conv_2d", "depthwise_conv_2d", "reshape", "fully_connected"]


def test_a_positive_factor_melts_into_the_product_before_the_clip():
    quantized = calibrate(quantize_model(between(by_hand), "w8a8"), images())
    assert kinds(quantized) == ["conv_2d", "depthwise_conv_2d", "reshape", "fully_connected"]
    # 0.5 at 0 and 1 at 3: the grid ends where the clip does.
    found = [x.quantizer for x in quantized.layers if isinstance(x, Quantize)]
    limits = [q.max_value for q in found if getattr(q, "max_value", None) is not None]
    assert limits == pytest.approx([1.0, 1.0])  # the gate's and the pool's


def test_a_limit_is_learned_below_and_clips_where_it_says():
    quantized = calibrate(quantize_model(between(K.ReLU(0.4, name="clip")), "w4a4"), images())
    quantizer = quantized.get_layer("clip_quantize").quantizer
    assert quantizer.max_value == pytest.approx(0.4)
    top = quantizer.grid()
    assert float(top.scale) * top.hi <= 0.4 + 1e-6  # float32


def test_codes_of_a_sigmoid_are_read_at_fewer_bits_from_8():
    quantized = quantize_model(between(lambda x: K.Conv2D(2, 1, name="c")(ops.sigmoid(x))), "w4a4")
    made = grids(quantized)
    (own,) = (name for name in made if "sigmoid" in name and made[name] == 8)
    assert isinstance(quantized.get_layer(own).quantizer, quantizers.Affine)
    assert sum(bits == 4 for bits in made.values()) == 1


@pytest.mark.parametrize("name", ["silu", "hard_silu"])
def test_gates_pass_gradients_to_both_factors(name):
    """d(x g(x)) / dx of a unit kernel, against differences of the float activation."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, K.Dense(3, activation=name, name="d")(inputs))
    data = np.float32([[-1.5, 0.25, 2.0], [-4.0, 4.0, 1.0]])
    model.get_layer("d").kernel.assign(np.eye(3))
    quantized = calibrate(quantize_model(model, "w8a8"), data, method="minmax")
    (got,) = gradient(lambda x: ops.sum(quantized(x)), data)
    gate = keras.activations.get(name)
    high, low = (ops.convert_to_numpy(gate(data + e)) for e in (1e-3, -1e-3))
    # Codes of the input and of the gate are up to 4 / 254 and 1 / 510 off their reals.
    np.testing.assert_allclose(got, (high - low) / 2e-3, atol=0.03)


def test_a_limit_far_below_what_is_added_leaves_the_sum_a_grid():
    """On the clip's own grid, steps of 4e-6, each summand has more than 2^8 steps a code."""

    def limited(x):
        return K.ReLU(1e-3, name="clip")(K.Add(name="sum")([x, K.ReLU()(x)]))

    quantized = calibrate(quantize_model(between(limited), "w8a8"), images())
    assert {"sum_quantize", "clip_quantize"} <= set(grids(quantized))
    assert kinds(quantized).count("add") == 1


def test_a_product_saturates_where_the_runtime_has_no_multiplier_for_it():
    """Steps of a and b / 1000 for the result: 255.5 is the most that a * b / step may be."""

    def square(x):
        return K.Multiply(name="square")([x, x])

    quantized = calibrate(quantize_model(between(square), "w8a8"), images())
    quantizer = quantized.get_layer("square_quantize").quantizer
    a = float(np.array(ops.convert_to_numpy(quantized.get_layer("stem_quantize").quantizer.scale)))
    quantizer.take_scale(np.float32(a * a / 1000))
    graph = integer_graph(quantized)
    (op,) = (op for op in graph.ops if op.kind == "multiply")
    # As float32, and settled by seven of its last places at most: 1e-6.
    assert a * a / graph.tensors[op.output].scale == pytest.approx(255.5, rel=2e-6)
    assert_same_integers(quantized, images())


def test_what_cannot_be_multiplied_says_so():
    def flat(x):
        y = K.Dense(4, name="gate")(K.GlobalAveragePooling2D()(x))
        return K.Multiply(name="excite")([x, y])

    with pytest.raises(ValueError, match="excite: tensors to add or multiply must have"):
        integer_graph(calibrate(quantize_model(between(flat), "w8a8"), images()))


@pytest.mark.parametrize(
    ("join", "other"),
    [
        (ops.multiply, (4,)),
        (ops.add, (4,)),
        (lambda x, y: y * x, (3, 4)),
    ],
)
def test_operators_on_tensors_of_different_ranks_are_refused(join, other):
    """`x * y` lines up batches with rows or columns, the layer `Multiply` with batches."""
    one, two = keras.Input((4, 3, 4), name="one"), keras.Input(other, name="two")
    x = K.Conv2D(4, 1, name="stem")(one)
    model = keras.Model([one, two], K.Flatten()(join(x, two)))
    shape = (1,) * (3 - len(other)) + other
    message = rf"as many axes\. Got .*4, 3, 4.*Reshape\({re.escape(str(shape))}\)"
    with pytest.raises(NotExportable, match=message):
        quantize_model(model, "w8a8")
    (line,) = tflite_export.check(model)
    assert re.search(message, line)


@pytest.mark.parametrize("join", [K.Multiply(), K.Add()], ids=["multiply", "add"])
def test_layers_on_tensors_of_different_ranks_have_the_same_objection(join):
    """A layer stays what it was, so such a model is quantized; no file holds it."""
    x = one = keras.Input((4, 3, 4), name="one")
    y = K.Dense(4, name="gate")(K.GlobalAveragePooling2D()(x))
    model = keras.Model(one, join([K.Conv2D(4, 1, name="stem")(x), y]))
    (line,) = tflite_export.check(quantize_model(model, "w8a8"))
    assert re.search(r"as many axes\. Got \(1, 4, 3, 4\).*Reshape\(\(1, 1, 4\)\)", line)


def test_the_way_out_of_different_ranks_is_exported():
    def excite(x):
        y = K.Dense(4, name="gate")(K.GlobalAveragePooling2D()(x))
        return x * K.Reshape((1, 1, 4))(y)

    assert_same_integers(assert_close(between(excite), data=images()), images())


@pytest.mark.parametrize("name", ["squeezed by a sigmoid", "silu", "leaky", "gated sum"])
def test_mixed_precision_loses_no_code_between_grids(name):
    model = between(BLOCKS[name])
    want = calibrate(quantize_model(model, "w8a8"), images())
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = quantize_model(model, "w8a8")
        mixed.set_weights(want.get_weights())
        got = mixed.predict(images(), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(got, want.predict(images(), verbose=0))


@pytest.mark.parametrize("name", ["silu", "leaky_relu"])
def test_by_hand_they_are_refused_with_the_way_out(name):
    inputs = keras.Input((3,))
    x = QuantizedDense(2, activation=name, input_quantizer="lsq", output_quantizer="lsq", name="d")
    model = calibrate(keras.Model(inputs, x(inputs)), images()[:, 0, 0])
    with pytest.raises(NotExportable, match=f"d: {name} becomes two tensors"):
        integer_graph(model)


def test_what_is_upsampled_between_pixels_is_refused():
    model = between(K.UpSampling2D(interpolation="bilinear", name="larger"))
    (objection,) = tflite_export.check(model)
    assert "larger: only interpolation='nearest'" in objection


def test_constants_that_differ_by_pixel_are_refused_by_name():
    mask = np.ones((4, 3, 4), "float32")
    model = between(lambda x: ops.multiply(x, mask))
    (objection,) = tflite_export.check(model)
    assert "Multiply" in objection
    with pytest.raises(NotExportable, match="Multiply"):
        integer_graph(calibrate(quantize_model(model, "w8a8"), images()))


def test_pixels_rescaled_step_by_step_keep_a_code_each():
    """`x / 127.5 - 1`, as `preprocess_input` writes it, is one Rescaling."""
    inputs = keras.Input(SHAPE, name="image")
    x = K.Conv2D(4, 3, name="stem")(inputs / 127.5 - 1.0)
    model = keras.Model(inputs, K.Dense(2, name="head")(K.GlobalAveragePooling2D()(x)))
    pixels = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype("float32")
    quantized = calibrate(quantize_model(model, "w8a8"), pixels)
    quantizer = next(x for x in quantized.layers if isinstance(x, Quantize)).quantizer
    grid = quantizer.grid()
    np.testing.assert_allclose(float(grid.scale), 1 / 127.5, rtol=1e-6)  # float32
    assert (grid.lo, grid.hi) == (-128, 127)
    # -1.0 / (1 / 127.5) = -127.5, half a code beside -128.
    np.testing.assert_allclose(quantizer.offset, -1 + 128 / 127.5, rtol=1e-6)  # as above
    assert_same_integers(quantized, pixels, pixels)


def test_padding_between_two_rescalings_is_refused():
    inputs = keras.Input(SHAPE)
    x = K.ZeroPadding2D(1)(K.Rescaling(1 / 255)(inputs))
    x = K.Conv2D(2, 1)(K.Rescaling(2.0, -1.0, name="second")(x))
    with pytest.raises(ValueError, match="second: the zeros that are put around"):
        quantize_model(keras.Model(inputs, x), "w8a8")


def test_an_input_is_not_turned_around():
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, K.Conv2D(2, 1)(K.Rescaling(-1.0, name="negative")(inputs)))
    with pytest.raises(ValueError, match="negative: an input must be rescaled by a positive"):
        quantize_model(model, "w8a8")
