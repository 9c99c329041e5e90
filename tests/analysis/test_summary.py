import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import layers
from keras_lowbit.analysis import summary
from keras_lowbit.transform import calibrate, quantize_model

K = keras.layers


def summed(model):
    """The summary and its text."""
    lines = []
    return summary(model, print_fn=lines.append), "\n".join(lines)


def rows(model):
    return {row.name: row for row in summed(model)[0].rows}


def small():
    x = inputs = keras.Input((6, 5, 3), name="image")
    x = K.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(x)
    x = K.ReLU(name="relu")(K.BatchNormalization(name="bn")(x))
    x = K.DepthwiseConv2D(3, strides=2, depth_multiplier=2, name="dw")(x)
    x = K.Flatten(name="flat")(x)
    return keras.Model(inputs, K.Dense(7, name="head")(x), name="small")


def test_costs_worked_by_hand():
    found = rows(quantize_model(small(), {"*": "w4a3", "head": "w2a4", "stem": "w8a8"}))
    stem, dw, head, bn = (found[n] for n in ("stem", "dw", "head", "bn"))
    # 3*3*3 products for each of 6*5*4 outputs, 8 bits by 8 bits
    assert (stem.kernel_bits, stem.input_bits) == (8, 8)
    assert stem.macs == 6 * 5 * 4 * 27 == 3240
    assert stem.bit_operations == 3240 * 64
    assert stem.parameters == stem.code_bytes == 108
    assert stem.float_bytes == 4 * 4  # a scale for each filter
    assert stem.output_shape == (None, 6, 5, 4)
    # VALID, stride 2: 2 x 2 outputs of 8 channels
    assert (dw.kernel_bits, dw.input_bits) == (4, 3)
    assert dw.macs == 2 * 2 * 9 * 8
    assert dw.bit_operations == 288 * 12
    assert dw.parameters == 72 + 8
    assert dw.code_bytes == 36
    assert dw.float_bytes == 4 * (8 + 8)
    # 32 x 7 codes of two bits
    assert (head.kernel_bits, head.input_bits) == (2, 4)
    assert (head.macs, head.code_bytes) == (224, 56)
    assert (bn.kernel_bits, bn.parameters, bn.bytes, bn.bit_operations) == (None, 16, 64, 0)


def test_totals_are_sums_and_ratios_to_float32():
    model = small()
    found, _ = summed(quantize_model(model, "w4a4"))
    assert found.parameters == model.count_params() == 108 + 16 + 80 + 231
    assert found.code_bytes == 108 + 36 + 224
    assert found.bytes == sum(row.bytes for row in found.rows)
    assert found.times_smaller == 4 * 435 / found.bytes
    assert found.macs == 3240 + 288 + 224
    assert found.bit_operations == 3240 * 64 + 288 * 16 + 224 * 64
    assert found.times_fewer_bit_operations == found.macs * 1024 / found.bit_operations


def test_a_float_model_is_all_float():
    model = small()
    found, text = summed(model)
    assert found.floats == dict.fromkeys(("stem", "dw", "head"), "the model is not quantized")
    assert found.bytes == found.float_bytes == 4 * model.count_params()
    assert found.times_smaller == found.times_fewer_bit_operations == 1
    assert found.uncalibrated == []
    assert "uncalibrated" not in text


def test_bits_follow_set_bits():
    model = quantize_model(small(), "w4a4")
    model.get_layer("dw").kernel_quantizer.set_bits(2)
    assert rows(model)["dw"].code_bytes == 18


def test_separable_layers_are_two_products():
    inputs = keras.Input((6, 5, 3))
    x = K.SeparableConv2D(7, 3, depth_multiplier=2, name="sep")(inputs)
    model = keras.Model(inputs, x)
    scheme = {"kernel_bits": 4, "activation_bits": 6, "ends_bits": None}
    found = rows(quantize_model(model, scheme))
    first, second = found["sep/depthwise"], found["sep/pointwise"]
    assert first.output_shape == (None, 4, 3, 6)
    assert second.output_shape == (None, 4, 3, 7)
    assert (first.macs, second.macs) == (4 * 3 * 9 * 6, 4 * 3 * 6 * 7)
    assert (first.input_bits, second.input_bits) == (8, 6)  # images have 8 bits, `between` 6
    assert (first.code_bytes, second.code_bytes) == (27, 21)
    assert first.parameters + second.parameters == 54 + 42 + 7
    # scales: 6 depthwise, 7 pointwise, 1 between; biases: 7
    assert first.float_bytes + second.float_bytes == 4 * (6 + 7 + 1 + 7)
    plain = rows(model)
    assert plain["sep/pointwise"].float_bytes == 4 * (42 + 7)
    assert plain["sep/depthwise"].macs == first.macs


def test_grouped_convolutions_count_their_own_products():
    inputs = keras.Input((6, 5, 4))
    model = keras.Model(inputs, K.Conv2D(8, 1, groups=2, name="g")(inputs))
    assert rows(model)["g"].macs == 6 * 5 * 8 * 2


def test_a_shared_layer_costs_memory_once_and_work_twice():
    conv = K.Conv2D(3, 1, use_bias=False, name="shared")
    inputs = keras.Input((6, 5, 3))
    model = quantize_model(keras.Model(inputs, conv(K.ReLU()(conv(inputs)))), "w8a8")
    first, second = [r for r in summed(model)[0].rows if r.name == "shared"]
    assert (first.bytes, second.bytes, second.parameters) == (9 + 12, 0, 0)
    assert first.macs == second.macs == 270
    assert second.note.startswith("shared")


def test_a_second_grid_on_a_tensor_is_shown():
    inputs = keras.Input((6, 5, 3))
    x = K.Conv2D(4, 1, activation="relu", name="stem")(inputs)
    both = [K.Conv2D(4, 1, name=n)(x) for n in ("narrow", "wide")]
    x = K.Conv2D(4, 1, name="end")(K.Add(name="sum")(both))
    model = quantize_model(keras.Model(inputs, x), {"*": "w8a8", "narrow": "w4a4"})
    found, text = summed(calibrate(model, np.ones((2, 6, 5, 3), "float32")))
    notes = [r.note for r in found.rows if "moves codes" in r.note]
    assert notes == ["moves codes from 8 to 4 bits"]
    assert notes[0] in text


def test_uncalibrated_grids_are_marked_until_they_saw_data():
    model = quantize_model(small(), "w4a4")
    found, text = summed(model)
    assert {"stem", "dw", "head", "image_quantize"} <= set(found.uncalibrated)
    assert "run keras_lowbit.calibrate(model, images)" in text
    calibrate(model, np.random.default_rng(0).uniform(size=(4, 6, 5, 3)))
    found, text = summed(model)
    assert found.uncalibrated == []
    assert "calibrate" not in text
    model.get_layer("relu_quantize").quantizer.calibrated.assign(0.0)
    assert summed(model)[0].uncalibrated == ["relu_quantize", "dw"]


def reasons(build, scheme="w8a8"):
    inputs = keras.Input((6, 5, 3))
    return summed(quantize_model(keras.Model(inputs, build(inputs)), scheme))[0].floats


def conv(name, **kwargs):
    return K.Conv2D(4, 1, name=name, **kwargs)


def test_an_unsupported_layer_says_so_and_so_do_its_followers():
    def build(x):
        x = K.LayerNormalization(name="ln")(conv("a")(x))
        x = K.MaxPooling2D(name="pool")(x)
        return conv("b")(x)

    assert reasons(build) == {
        "ln": "LayerNormalization has no quantized form",
        "pool": "it reads ln, which stays float",
    }


def test_an_exception_in_the_scheme_says_so():
    def build(x):
        return conv("c")(conv("b")(conv("a")(x)))

    assert reasons(build, {"*": "w8a8", "b": None}) == {"b": "the scheme leaves it out"}


def test_unsupported_activations_say_so():
    def build(x):
        x = conv("a", activation="gelu")(x)
        x = K.ReLU(threshold=0.1, name="late")(conv("b")(x))
        return conv("c")(x)

    found = reasons(build)
    assert found == {
        "a_gelu": "activation 'gelu' has no integer form",
        "late": "activation 'relu_variant' has no integer form",
    }


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_probabilities_are_exact_anywhere(name):
    last = K.Activation(name, name="p")
    assert reasons(lambda x: last(conv("a")(x))) == {}
    assert reasons(lambda x: conv("b")(last(conv("a")(x)))) == {}


def test_constants_are_exact_where_they_are_one_a_channel():
    assert reasons(lambda x: conv("b")(ops.add(conv("a")(x), 1.0))) == {}
    mask = np.ones((6, 5, 4), "float32")
    found = reasons(lambda x: conv("b")(ops.multiply(conv("a")(x), mask)))
    assert list(found.values()) == ["Multiply has no quantized form"]


def test_operations_without_a_form_say_so():
    found = reasons(lambda x: conv("b")(ops.exp(conv("a")(x))))
    assert list(found.values()) == ["Exp has no quantized form"]


def test_layers_put_in_by_hand_say_what_they_lack():
    x = inputs = keras.Input((4,))
    x = layers.QuantizedDense(3, name="no_input")(x)
    x = layers.QuantizedDense(3, input_quantizer="lsq", kernel_quantizer=None, name="no_kernel")(x)
    x = layers.QuantizedDense(3, input_quantizer="lsq", activation="tanh", name="bent")(x)
    model = keras.Model(inputs, x)
    found = summed(model)[0]
    assert {k: v.split(" (")[0] for k, v in found.floats.items()} == {
        "no_input": "its input has no grid",
        "no_kernel": "kernel_quantizer is None",
        "bent": "activation 'tanh' has no integer form",
    }
    by_name = {r.name: r for r in found.rows}
    assert (by_name["no_input"].kernel_bits, by_name["no_input"].input_bits) == (8, 32)
    assert (by_name["no_kernel"].kernel_bits, by_name["no_kernel"].input_bits) == (32, 8)
    assert by_name["no_kernel"].float_bytes >= 4 * 12


def test_a_clean_model_has_no_float_rows():
    assert summed(quantize_model(small(), "w4a4"))[0].floats == {}


def test_dynamic_sizes_have_unknown_work_and_known_bytes():
    inputs = keras.Input((None, None, 3))
    found, text = summed(keras.Model(inputs, K.Conv2D(4, 3, name="c")(inputs)))
    assert found.macs is None
    assert found.bit_operations is None
    assert found.times_fewer_bit_operations is None
    assert found.bytes == 4 * (108 + 4)
    assert "?x?x4" in text


def test_nested_models_are_opened():
    inner = keras.Sequential([keras.Input((4,)), K.Dense(2, name="d")], name="inner")
    inputs = keras.Input((4,))
    assert list(rows(keras.Model(inputs, inner(inputs)))) == ["inner/d"]


def test_the_table_is_printed_once_and_is_the_summary(capsys):
    found = summary(small())
    assert capsys.readouterr().out == f"{found}\n"


def test_the_table_as_text(golden):
    keras.utils.set_random_seed(0)
    golden("summary", str(summed(quantize_model(small(), "w4a4"))[0]))


def test_models_without_a_graph_are_refused():
    with pytest.raises(ValueError, match="has no input shape yet"):
        summary(keras.Sequential([K.Dense(2)]))


def bilinear(x):
    return K.UpSampling2D(2, interpolation="bilinear", name="odd")(x)


def mean_over_channels(x):
    return ops.mean(x, axis=-1, keepdims=True)


def turned(x):
    return x[:, ::-1]


def surround(x):
    return ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=2.0)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (bilinear, "only interpolation='nearest'"),
        (mean_over_channels, "only a mean over height and width"),
        (turned, "only slices that step forward"),
        (surround, "only zero padding is supported"),
    ],
)
def test_what_an_export_refuses_is_listed_with_the_reason(odd, words):
    inputs = keras.Input((6, 5, 3))
    x = odd(K.Conv2D(4, 3, padding="same", name="a")(inputs))
    x = K.Dense(2, name="head")(K.Flatten(name="flat")(x))
    model = quantize_model(keras.Model(inputs, x), "w8a8")
    found, text = summed(model)
    (why,) = [why for why in found.floats.values() if words in why]
    assert not why.startswith(f"{next(k for k, v in found.floats.items() if v == why)}:")
    assert words in text
    assert any(words in line for line in tflite_export.check(model))


def test_a_model_for_images_of_any_size_still_has_a_summary():
    inputs = keras.Input((None, None, 3))
    x = K.GlobalAveragePooling2D()(K.Conv2D(4, 3, name="a")(inputs))
    assert summed(quantize_model(keras.Model(inputs, x), "w8a8"))[0].floats == {}


def test_a_pool_of_codes_over_the_border_stays_on_its_grid():
    inputs = keras.Input((6, 5, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
    x = keras.layers.AveragePooling2D(3, 1, padding="same")(x)
    x = keras.layers.Conv2D(4, 1)(x)
    model = quantize_model(keras.Model(inputs, keras.layers.Conv2D(2, 1)(x)), "w4a4")
    notes = [row.note for row in summary(model).rows]
    assert "moves codes from 8 to 4 bits" in notes
