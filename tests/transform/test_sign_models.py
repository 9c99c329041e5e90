"""Models of scheme w1a1 with signs: what is trained is what the integers compute."""

import keras
import numpy as np
import pytest

from keras_lowbit import NotExportable, Scheme, calibrate, layers, quantize_model
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.quantizers import LSQ, Sign
from keras_lowbit.transform import freeze
from tests.exactness.hostile import hostile
from tests.gradients import gradient

K = keras.layers
SIGNS = Scheme(1, 1, binary_activation="sign")
SHAPE = (7, 6, 2)


def images(count=12):
    return np.random.default_rng(0).random((count, *SHAPE), np.float32)


def bi_real():
    """Convolutions with SAME padding, strides and a sum, batch norms where ReLUs would be."""
    inputs = keras.Input(SHAPE, name="image")
    x = K.BatchNormalization(name="stem_bn")(K.Conv2D(4, 3, padding="same", name="stem")(inputs))
    y = K.Conv2D(4, 3, padding="same", use_bias=False, name="first")(x)
    x = K.Add(name="sum")([x, K.BatchNormalization(name="first_bn")(y)])
    x = K.Conv2D(6, 3, strides=2, padding="same", use_bias=False, name="second")(x)
    x = K.BatchNormalization(name="second_bn")(x)
    x = K.DepthwiseConv2D(3, padding="same", name="deep")(x)
    x = K.BatchNormalization(name="deep_bn")(x)
    x = K.SeparableConv2D(4, 3, padding="same", name="separable")(x)
    x = K.Dense(5, name="dense")(K.Flatten(name="flat")(x))
    return hostile(keras.Model(inputs, K.Dense(3, name="head")(x)), 1)


@pytest.fixture
def model():
    return calibrate(quantize_model(bi_real(), SIGNS), images())


def grids(model):
    return {
        layer.name.removesuffix("_quantize"): layer.quantizer
        for layer in model.layers
        if isinstance(layer, layers.Quantize)
    }


def test_tensors_read_at_one_bit_are_signs_and_the_others_are_not(model):
    found = {name: type(quantizer).__name__ for name, quantizer in grids(model).items()}
    signs = {name for name, kind in found.items() if kind == "Sign"}
    assert signs == {"stem_bn_quantize_2", "sum_quantize_2", "second_bn", "deep_bn", "flat"}
    assert isinstance(model.get_layer("separable").between_quantizer, Sign)
    assert {layer.pad_code for layer in model.layers if hasattr(layer, "pad_code")} == {0, -1}
    assert model.get_layer("stem").pad_code == 0
    assert all(model.get_layer(n).pad_code == -1 for n in ("first", "second", "deep", "separable"))


def test_every_sign_of_the_trained_model_is_that_of_the_integers(model):
    """No bias in front of a sign is rounded, so no code differs."""
    graph = integer_graph(model)
    integers = reference.run(graph, {graph.inputs[0]: images()})
    names = {"stem_bn_quantize_2": "stem_bn_a1", "sum_quantize_2": "sum_a1"}
    for name, quantizer in grids(model).items():
        if not isinstance(quantizer, Sign):
            continue
        pair = model.get_layer(name if name in names else f"{name}_quantize")
        codes = keras.Model(model.inputs, pair.output[0]).predict(images(), verbose=0)
        made = integers[names.get(name, name)].astype(int) + 128
        assert set(np.unique(made)) == {0, 1}
        np.testing.assert_array_equal(2 * made - 1, codes)


def test_the_frozen_model_is_the_reference(model):
    graph = integer_graph(model)
    wanted = reference.run(graph, {graph.inputs[0]: images()})[graph.outputs[0]]
    got = freeze(model).predict(images(), verbose=0)
    np.testing.assert_array_equal(got, wanted)
    assert len(np.unique(wanted)) > 3


def test_calibration_sees_sums_of_signs():
    """Nine products of 1: a reader's 8-bit grid reaches to 9 kernel scales, not to 9 reals of 5."""
    inputs = keras.Input((3, 3, 1))
    made = layers.QuantizedConv2D(1, 3, kernel_quantizer=LSQ(1, axis=-1), input_quantizer="sign")
    grid = layers.Quantize(LSQ(8, role="activation"))
    small = keras.Model(inputs, layers.Dequantize()(grid(made(inputs))))
    made.kernel.assign(np.full((3, 3, 1, 1), 0.5))
    calibrate(small, np.full((2, 3, 3, 1), 5.0, np.float32), method="minmax")
    assert grid.quantizer.grid().scale * 127 == pytest.approx(4.5)


def test_gradients_reach_every_kernel(model):
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    found = gradient(
        lambda: keras.ops.mean(keras.ops.square(model(images(), training=True))), variables=kernels
    )
    assert [bool(np.any(g)) for g in found] == [True] * 8


def test_a_saved_model_keeps_signs_and_borders(model, tmp_path):
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.get_layer("first").pad_code == -1
    np.testing.assert_array_equal(*(m.predict(images(), verbose=0) for m in (model, again)))


@pytest.mark.once
class TestRefusals:
    def test_signs_behind_a_relu(self):
        inputs = keras.Input(SHAPE)
        x = K.Conv2D(2, 1, activation="relu", name="stem")(inputs)
        x = K.Conv2D(2, 1, name="middle")(x)
        model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
        with pytest.raises(ValueError, match=r"stem: nothing is negative .*'heaviside'"):
            quantize_model(model, SIGNS)
        assert quantize_model(model, "w1a1").get_layer("middle").pad_code == 0

    @pytest.mark.parametrize(
        ("between", "message"),
        [
            (lambda x: K.ZeroPadding2D(1, name="z")(x), "z: the zeros .* padding='same'"),
            (lambda x: K.ReLU(name="r")(x), "c: the sign of what a ReLU leaves"),
        ],
    )
    def test_what_has_no_sign(self, between, message):
        inputs = keras.Input(SHAPE)
        x = layers.QuantizedConv2D(2, 1, input_quantizer=LSQ(8, role="activation"), name="c")(
            inputs
        )
        pair = layers.Quantize("sign", bits=1)(between(x))
        x = layers.QuantizedConv2D(2, 3)(pair)
        model = keras.Model(inputs, layers.Dequantize()(layers.Quantize("lsq")(x)))
        with pytest.raises(NotExportable, match=message):
            integer_graph(calibrate(model, images()))

    def test_a_border_that_files_do_not_have(self):
        inputs = keras.Input(SHAPE)
        x = layers.Quantize("lsq")(inputs)
        x = layers.Quantize("sign", bits=1)(layers.QuantizedConv2D(2, 1)(x))
        x = layers.QuantizedConv2D(2, 3, padding="same", name="c")(x)
        model = keras.Model(inputs, layers.Dequantize()(layers.Quantize("lsq")(x)))
        with pytest.raises(NotExportable, match=r"c pads its input with code 0, the file with -1"):
            integer_graph(calibrate(model, images()))

    def test_images_of_signs(self):
        inputs = keras.Input(SHAPE, name="image")
        x = layers.QuantizedConv2D(2, 3, input_quantizer="sign")(inputs)
        model = keras.Model(inputs, layers.Dequantize()(layers.Quantize("lsq")(x)))
        with pytest.raises(NotExportable, match="Input image: images cannot be signs"):
            integer_graph(calibrate(model, images()))

    def test_sums_and_outputs_of_signs(self):
        inputs = keras.Input(SHAPE)
        x = layers.QuantizedConv2D(2, 1, input_quantizer=LSQ(8, role="activation"))(inputs)
        x = layers.Dequantize()(layers.Quantize("sign", bits=1)(x))
        with pytest.raises(NotExportable, match="outputs need an 8-bit grid"):
            integer_graph(calibrate(keras.Model(inputs, x), images()))
        total = layers.Dequantize()(layers.Quantize("lsq")(K.Add(name="sum")([x, x])))
        with pytest.raises(NotExportable, match=r"sum: .*8-bit grids. Got 1 bits"):
            integer_graph(calibrate(keras.Model(inputs, total), images()))
