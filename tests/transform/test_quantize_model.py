import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import NotExportable, layers, quantizers
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.transform import calibrate, fold_batchnorm, quantize_model
from tests.transform.nearness import rounding_noise

K = keras.layers
SHAPE = (6, 5, 3)
FLAT8 = {"kernel_bits": 8, "activation_bits": 8}


def images(n=16, shape=SHAPE, low=0.0, high=1.0):
    return np.random.default_rng(0).uniform(low, high, (n, *shape)).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(x)


def grids(model):
    """`{Quantize layer: bits}`."""
    return {x.name: x.quantizer.bits for x in model.layers if isinstance(x, layers.Quantize)}


def kernels(model):
    """`{layer: kernel bits}`."""
    quantized = [x for x in model.layers if hasattr(x, "kernel_quantizer")]
    return {x.name: x.kernel_quantizer.bits for x in quantized}


def assert_close(model, scheme=FLAT8, data=None, **kwargs):
    """The 8-bit model gives the float model's outputs, nearly, and can become integers."""
    data = images() if data is None else data
    quantized = calibrate(quantize_model(model, scheme, **kwargs), data)
    expected, made = model.predict(data, verbose=0), quantized.predict(data, verbose=0)
    keras.tree.assert_same_structure(expected, made)
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(made), strict=True):
        np.testing.assert_allclose(b, a, atol=rounding_noise(quantized, a))
    return quantized


def assert_same_integers(quantized, reals, pixels=None, codes=1):
    """The integer graph's output, for reals or for the uint8 pixels that they come from."""
    graph = integer_graph(quantized, input_type="float32" if pixels is None else "uint8")
    fed = reals if pixels is None else pixels.astype("uint8")
    made = reference.run(graph, {graph.inputs[0]: fed})[graph.outputs[0]]
    expected = quantized.predict(reals, verbose=0)
    step = graph.tensors[graph.ops[-1].inputs[0]].scale
    # One code: float32 sums of the training graph fall on either side of a rounding tie.
    assert np.abs(made - expected).max() <= (codes + 0.01) * step


def small(inputs):
    x = K.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = K.ReLU(name="relu")(K.BatchNormalization(name="bn")(x))
    x = K.Conv2D(4, 3, name="mid")(x)
    return K.Dense(2, name="head")(K.GlobalAveragePooling2D(name="pool")(x))


def small_model():
    inputs = keras.Input(SHAPE, name="image")
    return keras.Model(inputs, small(inputs), name="small")


def test_ends_take_8_bits_and_the_middle_the_scheme():
    model = quantize_model(small_model(), "w2a3")
    assert kernels(model) == {"stem": 8, "mid": 2, "head": 8}
    # The input is 8-bit, `mid` reads 3 bits, the pool a stream of 8 and the head 8.
    assert grids(model) == {
        "image_quantize": 8,
        "relu_quantize": 3,
        "mid_quantize": 8,
        "pool_quantize": 8,
        "head_quantize": 8,
    }
    flat = {"kernel_bits": 2, "activation_bits": 3, "ends_bits": None}
    assert kernels(quantize_model(small_model(), flat)) == {"stem": 2, "mid": 2, "head": 2}


def test_ends_that_stay_float_are_the_layers_they_were_and_no_file_holds_them():
    scheme = {"kernel_bits": 2, "activation_bits": 3, "ends_bits": "float"}
    model = quantize_model(small_model(), scheme)
    assert kernels(model) == {"mid": 2}
    assert {type(model.get_layer(name)) for name in ("stem", "head")} == {K.Conv2D, K.Dense}
    calibrate(model, images())
    model.compile("sgd", "mse")
    model.fit(images(4), np.ones((4, 2)), verbose=0)
    assert np.isfinite(model.predict(images(4), verbose=0)).all()
    with pytest.raises(NotExportable, match="stem"):
        integer_graph(model)


def test_the_original_model_is_untouched():
    model = small_model()
    weights = [w.copy() for w in model.get_weights()]
    config, names = model.get_config(), [x.name for x in model.layers]
    quantized = calibrate(quantize_model(model, "w4a4"), images())
    quantized.compile("sgd", "mse")
    quantized.fit(images(4), np.ones((4, 2)), verbose=0)
    assert [x.name for x in model.layers] == names
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    shared = {id(x) for x in model.layers} & {id(x) for x in quantized.layers}
    assert shared == set()


def test_functional_models_are_close_and_integer():
    quantized = assert_close(small_model())
    assert quantized.name == "small_quantized"
    assert_same_integers(quantized, images())


@pytest.mark.parametrize("called", [False, True])
def test_sequential_models_are_quantized(called):
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            K.Rescaling(1 / 255),
            K.Conv2D(4, 3, activation="relu", name="a"),
            K.Flatten(),
            K.Dense(3, name="b"),
        ]
    )
    data = np.round(images() * 255)
    if called:
        model(data)
    assert_same_integers(assert_close(model, data=data), data)


def test_nested_models_are_opened():
    inner_in = keras.Input(SHAPE)
    inner = keras.Model(
        inner_in, K.Conv2D(4, 3, activation="relu", name="conv")(inner_in), name="in"
    )
    outer_in = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, name="conv")(K.ReLU()(inner(outer_in)))
    model = keras.Model(outer_in, K.Flatten()(x))
    quantized = assert_close(model, {"*": "w8a8", "in/conv": "w7a8"})
    assert kernels(quantized) == {"in_conv": 7, "conv": 8}
    assert_same_integers(quantized, images())


def test_a_shared_layer_has_one_kernel_and_a_grid_for_each_call():
    conv = K.Conv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input(SHAPE, name="image")
    x = K.ReLU(name="r1")(conv(inputs))
    model = keras.Model(inputs, K.Flatten(name="flat")(conv(x)))
    quantized = assert_close(model)
    assert kernels(quantized) == {"shared": 8}
    first, second = (quantized.get_layer(n).quantizer for n in ("image_quantize", "r1_quantize"))
    assert float(numpy(first.scale)) != float(numpy(second.scale))
    assert_same_integers(quantized, images())
    before = quantized.get_layer("shared").kernel
    assert sum(w is before for w in quantized.weights) == 1


def test_a_shared_nested_model_keeps_its_weights_once():
    inner = keras.Sequential([keras.Input((4,)), K.Dense(4, name="d")], name="inner")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inner(K.ReLU()(inner(inputs))))
    quantized = assert_close(model, data=images(shape=(4,)))
    assert len(kernels(quantized)) == 1


def test_operations_are_quantized_like_layers():
    inputs = keras.Input(SHAPE)
    x = ops.relu(K.Conv2D(4, 3, padding="same", name="a")(inputs))
    y = K.Conv2D(6, 3, strides=2, padding="same", name="b")(x)
    short = ops.pad(x[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (1, 1)])
    total = ops.relu(ops.add(y, short))
    x = ops.mean(total, axis=(1, 2))
    model = keras.Model(inputs, K.Dense(3, name="c")(x))
    quantized = assert_close(model)
    assert_same_integers(quantized, images())


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: keras.activations.relu(x, max_value=6),
        lambda x: keras.activations.relu(x, max_value=0.5),
        lambda x: keras.activations.relu(x, negative_slope=0.25),
        K.LeakyReLU(1.0),
    ],
    ids=["relu6", "limit", "slope", "no activation"],
)
def test_forms_of_a_relu_are_quantized_alike(activation):
    inputs = keras.Input(SHAPE)
    x = activation(K.Conv2D(4, 3, padding="same", name="a")(inputs))
    model = keras.Model(inputs, K.Dense(3, name="c")(K.Flatten()(x)))
    assert tflite_export.check(model) == []
    assert_same_integers(assert_close(model), images())


def test_a_slice_that_turns_an_image_round_is_refused():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, name="a")(inputs)[:, ::-1]
    (line,) = tflite_export.check(keras.Model(inputs, K.Conv2D(2, 1, name="b")(x)))
    assert "only slices that step forward" in line
    assert "Got x[:, ::-1]" in line


def test_adding_a_number_is_not_lost():
    inputs = keras.Input((4,))
    x = K.Dense(3, name="d")(inputs)
    model = keras.Model(inputs, K.Dense(2, name="e")(ops.add(x, 2.5)))
    quantized = assert_close(model, data=images(shape=(4,)))
    assert_same_integers(quantized, images(shape=(4,)))


@pytest.mark.parametrize("count", [3, 4])
def test_sums_of_several_tensors_are_added_two_at_a_time(count):
    inputs = keras.Input(SHAPE)
    parts = [K.Conv2D(4, 1, name=f"c{i}")(inputs) for i in range(count)]
    x = K.ReLU()(K.Add(name="sum")(parts))
    model = keras.Model(inputs, K.Flatten()(x))
    assert_same_integers(assert_close(model), images())


def test_several_inputs_and_outputs_keep_their_structure():
    one, two = keras.Input((4,), name="one"), keras.Input((5,), name="two")
    x = K.Dense(3, name="a")(one)
    y = K.Dense(3, name="b")(two)
    total = K.Add(name="sum")([x, y])
    model = keras.Model([one, two], {"sum": total, "more": K.Dense(2, name="c")(K.ReLU()(total))})
    random = np.random.default_rng(0)
    data = [random.normal(size=(16, n)).astype("float32") for n in (4, 5)]
    quantized = assert_close(model, data=data)
    assert [t.name for t in quantized.inputs] == ["one", "two"]
    assert set(quantized.output) == {"sum", "more"}


def test_a_softmax_stays_at_the_end_behind_a_grid():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, K.Dense(3, activation="softmax", name="p")(inputs))
    data = images(shape=(4,))
    quantized = assert_close(model, data=data)
    # A float32 softmax.
    np.testing.assert_allclose(quantized.predict(data, verbose=0).sum(-1), 1, atol=1e-5)
    integer_graph(quantized)


@pytest.mark.parametrize("how", ["fused", "layer", "operation"])
def test_a_sigmoid_stays_at_the_end_behind_a_grid(how):
    inputs = keras.Input((4,))
    x = K.Dense(3, activation="sigmoid" if how == "fused" else None, name="p")(inputs)
    if how == "layer":
        x = K.Activation("sigmoid", name="share")(x)
    elif how == "operation":
        x = ops.sigmoid(x)
    data = images(shape=(4,))
    quantized = assert_close(keras.Model(inputs, x), data=data)
    assert list(grids(quantized).values()) == [8, 8]
    graph = integer_graph(quantized)
    assert [op.kind for op in graph.ops][-2:] == ["logistic", "dequantize"]
    made = reference.run(graph, {graph.inputs[0]: data})[graph.outputs[0]]
    # Half a step of 1/256, and what a logit of another code makes of it: at most a quarter of it.
    # 1e-6 is what float32 makes of a sigmoid.
    logits = graph.tensors[graph.ops[-2].inputs[0]].scale
    expected = quantized.predict(data, verbose=0)
    assert np.abs(made - expected).max() <= 0.5 / 256 + 0.25 * logits + 1e-6


@pytest.mark.runtime
@pytest.mark.parametrize("output_type", ["float32", "int8"])
def test_the_file_of_a_model_that_says_yes_or_no_is_exact(output_type):
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, activation="relu", name="stem")(inputs)
    x = K.Dense(1, activation="sigmoid", name="yes")(K.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    assert tflite_export.check(model) == []
    quantized = calibrate(quantize_model(model, "w4a4"), images())
    result = tflite_export.convert(quantized, output_type=output_type, verify=images())
    assert result.mismatches == 0
    assert "logistic" in str(result)


def test_none_leaves_a_layer_float_and_readers_see_reals():
    model = quantize_model(small_model(), {"*": "w4a4", "mid": None})
    assert type(model.get_layer("mid")) is K.Conv2D
    assert kernels(model) == {"stem": 8, "head": 8}
    assert_close(small_model(), {"*": "w8a8", "mid": None})


def test_a_pattern_overrides_bits_and_a_shared_stream_is_requantized():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 1, activation="relu", name="stem")(inputs)
    a = K.Conv2D(4, 1, name="narrow")(x)
    b = K.Conv2D(4, 1, name="wide")(x)
    x = K.Conv2D(4, 1, name="end")(K.Add(name="sum")([a, b]))
    model = quantize_model(keras.Model(inputs, x), {"*": "w8a8", "narrow": "w4a4"})
    assert kernels(model)["narrow"] == 4
    made = grids(model)
    assert made["stem_quantize"] == 8
    assert made["stem_quantize_2"] == 4
    assert_same_integers(calibrate(model, images()), images())


def test_readers_of_one_width_share_one_grid():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 1, activation="relu", name="stem")(inputs)
    both = [K.Conv2D(4, 1, name=n)(x) for n in ("a", "b")]
    x = K.Conv2D(4, 1, name="end")(K.Concatenate(name="cat")(both))
    model = quantize_model(keras.Model(inputs, x), "w4a4")
    assert [n for n in grids(model) if n.startswith("stem")] == ["stem_quantize"]
    assert grids(model)["stem_quantize"] == 4


def test_unknown_schemes_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown scheme 'w4b4'.*Did you mean 'w4a4'"):
        quantize_model(small_model(), "w4b4")
    with pytest.raises(ValueError, match=r"unknown key 'kernel_bit'.*Did you mean 'kernel_bits'"):
        quantize_model(small_model(), {"kernel_bit": 4})


def test_a_pattern_that_matches_nothing_is_an_error_with_the_names():
    with pytest.raises(ValueError, match=r"\['haed'\] match no layer.*'stem', 'mid', 'head'"):
        quantize_model(small_model(), {"*": "w4a4", "haed": "w8a8"})


def test_unknown_quantizers_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown quantizer 'lsp'.*Did you mean 'lsq'"):
        quantize_model(small_model(), {"kernel": "lsp"})


@pytest.mark.parametrize("field", ["kernel_options", "activation_options"])
def test_options_that_a_quantizer_lacks_are_refused_by_the_scheme_s_key(field):
    for options, message in (
        ({"gradeint": "ewgs"}, "Quantizer 'lsq' has no option 'gradeint'.*mean 'gradient'"),
        ({"delta": -1}, "LSQ: delta must be a finite number, at least 0. Got -1"),
    ):
        with pytest.raises(ValueError, match=f"^Scheme: {field}: {message}"):
            quantize_model(small_model(), {field: options})


def test_options_are_not_blamed_for_bits():
    options = {"kernel": "dorefa", "kernel_bits": 8, "kernel_options": {"enabled": True}}
    with pytest.raises(ValueError, match=r"^DoReFa kernels take 1 to 7 bits"):
        quantize_model(small_model(), options)


def test_options_of_the_quantizer_between_a_separable_product_are_named_too():
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, K.SeparableConv2D(4, 3, name="pair")(inputs))
    with pytest.raises(ValueError, match=r"^Scheme: activation_options: Quantizer 'lsq' has no"):
        quantize_model(model, {"activation_options": {"nope": 1}})


def test_models_that_cannot_be_quantized_are_refused():
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="has no layer to quantize: expected Conv2D"):
        quantize_model(keras.Model(inputs, K.ReLU()(inputs)), "w8a8")
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_model(quantize_model(small_model(), "w8a8"), "w8a8")


def test_channels_first_are_refused_by_name_in_one_line():
    inputs = keras.Input((3, 6, 5))
    x = K.Conv2D(4, 3, data_format="channels_first", name="a")(inputs)
    x = K.DepthwiseConv2D(3, data_format="channels_first", name="b")(x)
    with pytest.raises(ValueError, match=r"^a, b: images must have their channels last[^\n]*$"):
        quantize_model(keras.Model(inputs, x), "w8a8")


def of_any_size(inputs):
    return K.GlobalAveragePooling2D()(K.Conv2D(4, 3)(inputs))


OBJECTIONS = {
    "dynamic size": ((None, None, 3), of_any_size, "dynamic shape"),
    "channels first": (
        (3, 6, 5),
        lambda x: K.Conv2D(4, 3, data_format="channels_first")(x),
        "last",
    ),
    "by channel": (SHAPE, lambda x: K.Conv2D(2, 1)(K.Rescaling([1.0, 2.0, 3.0])(x)), "by channel"),
    "one dimension": ((9, 3), K.Conv1D(2, 3), "no layer to quantize"),
}


@pytest.mark.parametrize("case", OBJECTIONS)
def test_check_lists_what_quantize_model_refuses(case):
    shape, body, words = OBJECTIONS[case]
    inputs = keras.Input(shape)
    (line,) = tflite_export.check(keras.Model(inputs, body(inputs)))
    assert words in line


# --- where images come in ---------------------------------------------------------------------


def affine_of(model, name="image_quantize"):
    quantizer = model.get_layer(name).quantizer
    assert isinstance(quantizer, quantizers.Affine)
    return quantizer


def test_rescaling_becomes_the_input_grid_with_256_codes():
    inputs = keras.Input(SHAPE, name="image")
    x = K.Rescaling(1 / 127.5, offset=-1, name="rescale")(inputs)
    model = keras.Model(inputs, K.Flatten()(K.Conv2D(4, 3, name="c")(x)))
    quantized = quantize_model(model, "w8a8")
    quantizer = affine_of(quantized, "rescale_quantize")
    pixels = np.arange(256, dtype="float32")
    codes, scale = quantizer.to_codes(ops.convert_to_tensor(pixels / 127.5 - 1))
    assert len(np.unique(numpy(codes))) == 256
    np.testing.assert_allclose(float(numpy(scale)), 1 / 127.5, rtol=1e-6)  # float32
    data = np.round(images() * 255)
    assert_same_integers(assert_close(model, data=data), data, pixels=data)


def test_input_range_keeps_256_codes_and_its_offset_in_the_bias():
    # Pixels 0..255 arrive as -1..1: 0.0 lies between 127 and 128, so codes stand for x + 1/255.
    inputs = keras.Input(SHAPE, name="image")
    x = K.Conv2D(4, 3, use_bias=False, name="c")(inputs)
    model = keras.Model(inputs, K.Flatten()(x))
    data = np.round(images() * 255) / np.float32(127.5) - 1
    quantized = assert_close(model, data=data, input_range=(-1, 1))
    quantizer = affine_of(quantized)
    codes, _ = quantizer.to_codes(ops.convert_to_tensor(np.linspace(-1, 1, 256, dtype="float32")))
    assert len(np.unique(numpy(codes))) == 256
    np.testing.assert_allclose(abs(quantizer.offset), 1 / 255, rtol=1e-5)  # float32
    layer = quantized.get_layer("c")
    total = numpy(model.get_layer("c").kernel).sum(axis=(0, 1, 2))
    # Biases are whole numbers of units that a file can hold, so half a unit off at most.
    unit = numpy(quantizer.scale) * numpy(layer.kernel_quantizer.scale)
    apart = np.abs(numpy(layer.bias) - quantizer.offset * total)
    assert np.all(apart <= 0.501 * unit)
    assert np.max(np.abs(quantizer.offset * total) / unit) > 5
    assert_same_integers(quantized, data, pixels=np.round((data + 1) * 127.5))


def test_an_input_range_must_rise():
    with pytest.raises(ValueError, match=r"input_range must rise\. Got \(1, -1\)"):
        quantize_model(small_model(), "w8a8", input_range=(1, -1))


def test_rescaling_by_channel_is_refused_with_the_way_out():
    inputs = keras.Input(SHAPE)
    x = K.Rescaling([1.0, 2.0, 3.0], name="r")(inputs)
    with pytest.raises(ValueError, match=r"r: Rescaling by channel.*Use Normalization"):
        quantize_model(keras.Model(inputs, K.Conv2D(2, 1)(x)), "w8a8")


def test_two_rescalings_are_one():
    """2 x / 255 - 2 in 2 / 255ths: codes -255..0."""
    inputs = keras.Input(SHAPE)
    x = K.Rescaling(2.0, offset=-2.0, name="r2")(K.Rescaling(1 / 255)(inputs))
    quantized = quantize_model(keras.Model(inputs, K.Conv2D(2, 1)(x)), "w8a8")
    quantizer = quantized.get_layer("r2_quantize").quantizer
    assert quantizer.static_bounds() == (-255, 0)
    np.testing.assert_allclose(numpy(quantizer.scale), 2 / 255, rtol=1e-6)  # float32


def test_without_a_known_range_the_images_decide():
    quantized = calibrate(quantize_model(small_model(), "w8a8"), images(low=-0.5, high=2.0))
    low, high = affine_of(quantized).static_bounds()
    scale = float(numpy(affine_of(quantized).scale))
    assert high - low == 255
    # Ends are whole codes: one step of 2.5 / 255.
    np.testing.assert_allclose([low * scale, high * scale], [-0.5, 2.0], atol=2.5 / 255)


def test_outputs_that_are_whole_numbers_get_no_grid():
    """An 8-bit grid would leave 256 of 300 classes."""
    inputs = keras.Input(SHAPE)
    scores = K.Dense(300, name="scores")(K.Flatten()(inputs))
    model = keras.Model(inputs, [scores, ops.argmax(scores, axis=-1)])
    quantized = calibrate(quantize_model(model, "w8a8"), images(64))
    found = quantized.predict(images(64), verbose=0)[1]
    wanted = model.predict(images(64), verbose=0)[1]
    assert np.issubdtype(found.dtype, np.integer)
    # Of random scores, the 8-bit kernel and pixels swap a few nearest ones.
    assert (found == wanted).mean() > 0.8


@pytest.mark.filterwarnings("ignore:The object being serialized includes a .lambda.")
def test_an_activation_without_a_name_runs_in_compiled_graphs():
    """`conv_<lambda>` was no name for TensorFlow."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, activation=lambda t: ops.relu(t) - 1.0, name="conv")(inputs)
    model = keras.Model(inputs, K.Dense(3)(K.Flatten()(x)))
    quantized = calibrate(quantize_model(model, "w8a8"), images(16))
    found, wanted = (m.predict(images(16), verbose=0) for m in (quantized, model))
    # A handful of steps of 8-bit grids, 127 to the largest value.
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("change", [lambda d: d.quantize("int8"), lambda d: d.enable_lora(2)])
def test_layers_that_keras_quantized_or_adapted_are_refused(change):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, name="d")])
    model = keras.Model(model.inputs, keras.layers.Dense(2, name="e")(model.outputs[0]))
    change(model.get_layer("d"))
    for refusing in (quantize_model, fold_batchnorm):
        with pytest.raises(
            ValueError, match=r"^d.*: quantized by Keras or with LoRA weights\. Pass"
        ):
            refusing(model)


# --- training ---------------------------------------------------------------------------------


def test_the_quantized_model_trains_saves_and_loads(tmp_path):
    model = calibrate(quantize_model(small_model(), "w4a4"), images())
    model.compile(keras.optimizers.SGD(0.05), "mse")
    data, targets = images(16), np.ones((16, 2), "float32")
    first = model.evaluate(data, targets, verbose=0)
    model.fit(data, targets, epochs=5, batch_size=8, verbose=0)
    assert model.evaluate(data, targets, verbose=0) < first
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model.predict(data, verbose=0), loaded.predict(data, verbose=0))


def test_of_a_backbone_that_ends_in_a_residual_sum_only_the_last_products_are_ends():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    for i in range(3):
        y = keras.layers.Conv2D(8, 1, activation="relu", name=f"expand{i}")(x)
        x = keras.layers.Add()([keras.layers.Conv2D(4, 1, name=f"project{i}")(y), x])
    made = quantize_model(keras.Model(inputs, x), "w4a4")
    bits = {
        layer.name: layer.kernel_quantizer.bits
        for layer in made.layers
        if hasattr(layer, "kernel_quantizer")
    }
    assert {name for name, width in bits.items() if width == 8} == {"stem", "project2"}
