"""What Keras layers become: graphs as text, and single rules with numbers worked by hand."""

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import NotExportable, Scheme, calibrate, quantize_model, quantizers
from keras_lowbit import layers as quantized_layers
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.emit import identity
from keras_lowbit.integer.products import integer_product
from keras_lowbit.integer.values import OnGrid
from keras_lowbit.numerics.grid import Grid

K = keras.layers


def fixed(model, scheme, reach=4.0):
    """The model at a scheme with grids that no backend's arithmetic decides."""
    small = quantize_model(model, scheme)
    for layer in small.layers:
        if isinstance(layer, quantized_layers.Quantize):
            low = -reach if layer.quantizer.signed else 0.0
            layer.quantizer.fit_scale(np.array([low, reach], np.float32), "minmax")
        elif hasattr(layer, "kernel_quantizer"):
            kernel = ops.convert_to_numpy(layer.kernel)
            layer.kernel.assign(np.linspace(-1, 1, kernel.size).reshape(kernel.shape))
            layer.kernel_quantizer.fit_scale(ops.convert_to_numpy(layer.kernel), "minmax")
    return small


def separable_block():
    """Depthwise-separable residual block of MobileNetV2's kind, batch norm everywhere."""

    def norm(x, name):
        return K.BatchNormalization(name=f"{name}_bn")(x)

    image = keras.Input((9, 7, 3), name="image")
    x = K.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(image)
    x = K.ReLU(6.0, name="stem_relu")(norm(x, "stem"))
    y = norm(K.Conv2D(16, 1, use_bias=False, name="expand")(x), "expand")
    y = K.ReLU(6.0, name="expand_relu")(y)
    y = norm(K.DepthwiseConv2D(3, padding="same", use_bias=False, name="spatial")(y), "spatial")
    y = K.ReLU(6.0, name="spatial_relu")(y)
    y = norm(K.Conv2D(8, 1, use_bias=False, name="project")(y), "project")
    x = K.Add(name="sum")([x, y])
    x = K.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, K.Dense(5, activation="softmax", name="classes")(x), name="block")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_a_separable_residual_block_reads_as_written(scheme, weights, golden):
    graph = integer_graph(fixed(separable_block(), scheme), weights=weights)
    golden(f"separable_block_{scheme}_{weights}", ir.dump(graph))


def one(model, kind, **options):
    """The only operation of a kind in a calibrated model's graph, and the graph."""
    graph = integer_graph(model, **options)
    (op,) = (op for op in graph if op.kind == kind)
    return op, graph


def rows(*lists):
    return [np.array(values, np.float32) for values in lists]


def data(*shape):
    return np.random.default_rng(0).random((8, *shape), np.float32)


def test_batch_norm_becomes_scales_signs_and_a_bias():
    """gain = gamma / sqrt(var + eps) = -2 and 0.5; shift = beta - gain * mean = 1 - (-2)(3) = 7."""
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1, use_bias=False, name="c")(inputs)
    x = K.BatchNormalization(epsilon=0.0, name="bn")(x)
    model = keras.Model(inputs, x)
    kernel = np.array([[1.0, 0.5], [-0.25, 1.0]], np.float32).reshape(1, 1, 2, 2)
    model.get_layer("c").kernel.assign(kernel)
    model.get_layer("bn").set_weights(rows([-4, 1], [1, 0], [3, 0], [4, 4]))
    small = calibrate(quantize_model(model), data(4, 4, 2))
    layer = small.get_layer("c")
    codes, scale = layer.kernel_quantizer.encode(layer.kernel)
    codes, scale = ops.convert_to_numpy(codes), ops.convert_to_numpy(scale).reshape(-1)
    op, graph = one(small, "conv_2d", input_type="int8", output_type="int8")
    np.testing.assert_array_equal(op.kernel, codes * np.array([-1, 1]))
    # Scales are written as float32: half a unit in the last place is 6e-8 of the value.
    np.testing.assert_allclose(op.kernel_scale, scale * np.array([2, 0.5]), rtol=1e-6)
    unit = graph.tensors[op.inputs[0]].scale * op.kernel_scale
    np.testing.assert_array_equal(op.bias, np.rint(np.array([7.0, 0.0]) / unit))


@pytest.mark.parametrize(
    ("options", "gain", "shift"),
    [
        # (x - 1) / 2 and (x - 2) / 4; the other way round x * 2 + 1 and x * 4 + 2
        ({"mean": [1.0, 2.0], "variance": [4.0, 16.0]}, (0.5, 0.25), (-0.5, -0.5)),
        ({"mean": [1.0, 2.0], "variance": [4.0, 16.0], "invert": True}, (2, 4), (1, 2)),
        ({"mean": 1.0, "variance": 4.0, "axis": None}, (0.5, 0.5), (-0.5, -0.5)),
    ],
)
def test_normalization_becomes_a_gain_and_a_bias(options, gain, shift):
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1, use_bias=False, name="c")(inputs)
    small = calibrate(
        quantize_model(keras.Model(inputs, K.Normalization(**options)(x))), data(4, 4, 2)
    )
    _, scale = small.get_layer("c").kernel_quantizer.encode(small.get_layer("c").kernel)
    op, graph = one(small, "conv_2d", input_type="int8", output_type="int8")
    wanted = ops.convert_to_numpy(scale).reshape(-1) * np.array(gain)
    np.testing.assert_allclose(op.kernel_scale, wanted, rtol=1e-6)  # float32
    unit = graph.tensors[op.inputs[0]].scale * op.kernel_scale
    np.testing.assert_array_equal(op.bias, np.rint(np.array(shift) / unit))


def test_normalization_by_pixel_is_refused_by_name():
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1)(inputs)
    layer = K.Normalization((1, 2, 3), name="by_pixel")
    layer.adapt(data(4, 4, 2))
    small = calibrate(quantize_model(keras.Model(inputs, layer(x))), data(4, 4, 2))
    with pytest.raises(NotExportable, match=r"by_pixel: .*one a channel.*axis=\(1, 2, 3\)"):
        integer_graph(small)


def test_a_channel_without_gain_keeps_its_bias_and_a_normal_scale():
    inputs = keras.Input((4, 4, 2))
    x = K.BatchNormalization(name="bn")(K.Conv2D(3, 1, name="c")(inputs))
    model = keras.Model(inputs, x)
    model.get_layer("bn").set_weights(rows([1, 0, 1], [0, 0.5, 0], [0, 0, 0], [1, 1, 1]))
    small = calibrate(quantize_model(model), data(4, 4, 2))
    op, graph = one(small, "conv_2d")
    assert not op.kernel[..., 1].any()
    assert op.kernel[..., [0, 2]].any()
    assert (op.kernel_scale > 1e-6).all()
    unit = graph.tensors[op.inputs[0]].scale * op.kernel_scale[1]
    # Without gain a unit is a step of the output, and biases are whole: half a step, and float32.
    step = graph.tensors[op.output].scale
    assert op.bias[1] * unit == pytest.approx(0.5, abs=0.501 * step)


@pytest.mark.runtime
@pytest.mark.parametrize("exponent", [25.5, 26.5, 27.8])
def test_a_bias_of_any_size_leaves_int4_files_exact(exponent):
    """Kernels for int4 multiply sums and bias by 16 on some processors: past 2^27 int32 ends."""
    inputs = keras.Input((4, 4, 8))
    model = keras.Model(inputs, K.ReLU()(K.Conv2D(6, 1, name="c")(inputs)))
    small = calibrate(quantize_model(model, Scheme(4, 4, ends_bits=None)), data(4, 4, 8))
    layer = small.get_layer("c")
    op, graph = one(small, "fully_connected", weights="int4")
    gain = np.float32([1, 1, 1, 1, 1, 2.0**-20])  # reals a code of the last channel stands for
    layer.kernel.assign(ops.convert_to_numpy(layer.kernel) * gain)
    scale = ops.convert_to_numpy(layer.kernel_quantizer.scale)
    layer.kernel_quantizer.scale.assign(scale * gain.reshape(scale.shape[-1:]))
    unit = graph.tensors[op.inputs[0]].scale * op.kernel_scale[5] * 2.0**-20
    layer.bias.assign(np.float32([0, 0, 0, 0, 0, unit * 2**exponent]))
    op, _ = one(small, "fully_connected", weights="int4")
    assert op.storage == "int4"
    assert op.kernel[..., 5].any() == (exponent < 26)
    assert np.abs(op.bias).max() < 2**26
    result = tflite_export.convert(small, weights="int4", verify=data(4, 4, 8))
    assert result.mismatches == 0


@pytest.mark.parametrize(("size", "before"), [(8, 0), (7, 1)])
def test_padding_that_same_would_have_put_there_melts_into_the_convolution(size, before):
    inputs = keras.Input((size, size, 2))
    x = K.ReLU()(K.Conv2D(2, 1, name="c")(inputs))
    x = K.ZeroPadding2D(((before, 1), (before, 1)))(x)
    model = keras.Model(inputs, K.Conv2D(2, 3, strides=2, name="d")(x))
    graph = integer_graph(calibrate(quantize_model(model), data(size, size, 2)))
    assert [op.kind for op in graph] == ["quantize", "conv_2d", "conv_2d", "dequantize"]
    assert graph.ops[2].padding == "SAME"


def test_other_padding_stays():
    inputs = keras.Input((8, 8, 2))
    x = K.ZeroPadding2D(((1, 0), (1, 0)))(K.ReLU()(K.Conv2D(2, 1)(inputs)))
    model = keras.Model(inputs, K.Conv2D(2, 3, strides=2, name="d")(x))
    op, _ = one(calibrate(quantize_model(model), data(8, 8, 2)), "pad")
    assert op.paddings == ((0, 0), (1, 0), (1, 0), (0, 0))


@pytest.mark.parametrize(
    ("scheme", "zero_point", "scale", "activation"),
    [("w4a4", -128, 6 / 15, "relu6"), ("w2a2", -128, 6 / 3, "relu6"), ("w2a8", -128, None, "relu")],
)
def test_unsigned_grids_end_at_a_fused_relu6(scheme, zero_point, scale, activation):
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1, activation="relu", name="c")(inputs)
    x = K.Conv2D(2, 1, activation="relu", name="d")(x)
    model = keras.Model(inputs, K.Conv2D(2, 1, name="e")(x))
    graph = integer_graph(calibrate(quantize_model(model, scheme), data(4, 4, 2)))
    op = next(op for op in graph if op.source == "c")
    tensor = graph.tensors[op.output]
    assert tensor.zero_point == zero_point
    if scale is None:
        assert op.activation in ("none", activation)
    else:
        assert op.activation == activation
        assert tensor.scale == pytest.approx(scale, rel=1e-6)  # float32


def test_an_output_that_is_read_nowhere_else_costs_nothing():
    """Both grids of a branch exist in Keras; the graph keeps what its outputs need."""
    inputs = keras.Input((4, 4, 2))
    x = K.Conv2D(2, 1, activation="relu", name="c")(inputs)
    model = keras.Model(inputs, K.Conv2D(2, 1, name="d")(x))
    graph = integer_graph(calibrate(quantize_model(model), data(4, 4, 2)))
    assert [op.kind for op in graph] == ["quantize", "conv_2d", "conv_2d", "dequantize"]


@pytest.mark.parametrize("readers", [1, 2])
def test_a_strided_slice_is_a_product_of_ones_that_keeps_codes(readers):
    inputs = keras.Input((5, 6, 2))
    x = K.Conv2D(2, 1, activation="relu", name="c")(inputs)
    y = K.Conv2D(2, 1, name="d")(x[:, ::2, ::3])
    model = keras.Model(inputs, [y, K.Conv2D(2, 1)(x)][:readers])
    graph = integer_graph(calibrate(quantize_model(model), data(5, 6, 2)))
    (op,) = (op for op in graph if op.kind == "depthwise_conv_2d")
    assert op.strides == (2, 3)
    values = reference.run(graph, {graph.inputs[0]: data(5, 6, 2)})
    np.testing.assert_array_equal(values[op.output], values[op.inputs[0]][:, ::2, ::3])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda x: K.Activation("tanh", name="t")(x), "t: activation 'tanh' has no exact"),
        (
            lambda x: ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], "reflect"),
            r"only zero padding .* Use ZeroPadding2D",
        ),
        (
            lambda x: x[:, 1:, 2, ..., ::2],
            r"takes an axis away. Got x\[:, 1:, 2, ..., ::2\]; write a slice of one",
        ),
        (lambda x: K.LayerNormalization(name="n")(x), "n .LayerNormalization. has no integer form"),
        (lambda x: K.ReLU(threshold=0.1, name="r")(x), r"r: ReLU\(threshold=0.1\) has no exact"),
        (
            lambda x: K.Activation(K.ReLU(6, negative_slope=0.5), name="r")(x),
            r"r: ReLU\(max_value=6, negative_slope=0.5\) has no .*leaky_relu .with a slope up to 1",
        ),
        (
            lambda x: K.BatchNormalization(1, name="b")(x),
            r"b: batch norm must run over the last axis. Got axis=1; build it with axis=-1",
        ),
        (
            lambda x: ops.mean(x, axis=-1, keepdims=True),
            r"only a mean over height and width .* that of GlobalAveragePooling2D. Got axis=\[-1\]",
        ),
    ],
)
def test_what_has_no_integer_form_is_refused_by_name(layer, message):
    inputs = keras.Input((6, 6, 2))
    x = layer(K.Conv2D(2, 1, activation="relu", name="c")(inputs))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    small = calibrate(quantize_model(model), data(6, 6, 2))
    with pytest.raises(NotExportable, match=message):
        integer_graph(small)


def test_a_softmax_layer_over_the_last_axis_of_one_tensor_alone_is_refused():
    """Axis 1 is the last of the logits, which the layer saw first, and rows of the table after."""
    inputs, share = keras.Input((6,)), K.Softmax(axis=1, name="share")
    first = K.Dense(12, name="table")(share(K.Dense(4, name="logits")(inputs)))
    model = keras.Model(inputs, share(K.Reshape((3, 4))(first)))
    with pytest.raises(NotExportable, match=r"share.*: only a softmax over the last axis"):
        integer_graph(calibrate(quantize_model(model), data(6)))


# --- inputs that are rescaled, and sums that end at 6 ---------------------------------------------


def pixels(*shape):
    """Every byte at least once in the first channel."""
    random = np.random.default_rng(0).integers(0, 256, (4, *shape))
    random.reshape(-1)[:256] = np.arange(256)
    return random.astype(np.float32)


def assert_as_trained(small, images):
    """What a sum of codes and rounded parts may be off at the end: two steps."""
    graph = integer_graph(small)
    feeds = {graph.inputs[0]: images.astype(graph.tensors[graph.inputs[0]].dtype)}
    values = reference.run(graph, feeds)
    found = keras.tree.flatten(small.predict(images, verbose=0))
    for name, trained in zip(graph.outputs, found, strict=True):
        (last,) = (op for op in graph if op.output == name)
        step = graph.tensors[last.inputs[0]].scale
        np.testing.assert_allclose(values[name], trained, atol=2.01 * step)  # 0.01 for float32
    return graph


@pytest.mark.parametrize("kind", ["add", "multiply"])
def test_a_rescaled_image_is_added_and_multiplied_in_reals(kind):
    """A global skip: the image is written in pixels, and what it meets in reals."""
    inputs = keras.Input((8, 8, 3), name="image")
    image = K.Rescaling(1 / 255)(inputs)
    x = K.Conv2D(3, 3, padding="same")(image)
    joined = K.Add()([image, x]) if kind == "add" else K.Multiply()([image, x])
    small = calibrate(quantize_model(keras.Model(inputs, joined)), pixels(8, 8, 3))
    graph = assert_as_trained(small, pixels(8, 8, 3))
    (op,) = (op for op in graph if op.kind == kind)
    assert graph.tensors[op.inputs[0]].scale == pytest.approx(1 / 255, rel=1e-5)  # float32


def test_a_rescaled_image_that_is_an_output_too_is_written_in_reals():
    inputs = keras.Input((8, 8, 3), name="image")
    image = K.Rescaling(1 / 255)(inputs)
    x = K.Conv2D(2, 3, name="c")(image)
    small = calibrate(
        quantize_model(keras.Model(inputs, [K.MaxPooling2D(1)(image), x])), pixels(8, 8, 3)
    )
    assert tflite_export.check(small) == []
    graph = assert_as_trained(small, pixels(8, 8, 3))
    found = reference.run(graph, {"image": pixels(8, 8, 3)})[graph.outputs[0]]
    np.testing.assert_allclose(found, pixels(8, 8, 3) / 255, atol=1e-6)  # float32


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_relu6_that_ends_inside_the_grid_may_stand_at_a_sum(place):
    """Grids of 0..8.9, as of a method without limits: code 172 is the last, and a bit above 6."""
    inputs = keras.Input((4, 4, 2))
    x, y = K.Conv2D(2, 1, name="c")(inputs), K.Conv2D(2, 1, name="d")(inputs)
    total = K.Add()([K.ReLU(6.0)(x), y]) if place == "before" else K.ReLU(6.0)(K.Add()([x, y]))
    small = quantize_model(keras.Model(inputs, K.Conv2D(2, 1, name="e")(total)))
    calibrate(small, 9 * data(4, 4, 2))
    for layer in small.layers:
        if getattr(getattr(layer, "quantizer", None), "max_value", None) == 6:
            layer.quantizer.max_value = None
            layer.quantizer.scale.assign(8.9 / 255)
    assert_as_trained(small, 9 * data(4, 4, 2))


def two_scalings(first, second):
    inputs = keras.Input((8, 8, 3), name="image")
    parts = [
        K.Conv2D(2, 3, name=name)(K.Rescaling(*scaling)(inputs))
        for name, scaling in (("c", first), ("d", second))
    ]
    return keras.Model(inputs, parts)


def test_an_input_may_be_rescaled_in_two_ways():
    """Pixel p is code p of the one grid, and p - 128 of the other."""
    model = two_scalings((1 / 255,), (1 / 127.5, -1.0))
    small = calibrate(quantize_model(model), pixels(8, 8, 3))
    assert tflite_export.check(small) == []
    graph = assert_as_trained(small, pixels(8, 8, 3))
    values = reference.run(graph, {"image": pixels(8, 8, 3).astype(np.uint8)})
    for name in ("c", "d"):
        (op,) = (op for op in graph if op.source == name and isinstance(op, ir.Product))
        np.testing.assert_array_equal(values[op.inputs[0]] + 128.0, pixels(8, 8, 3))


def two_grids(first, second):
    """One input on two grids of a model built by hand; Keras runs the layer made last first."""
    inputs = keras.Input((8, 8, 3), name="image")
    outputs = []
    for scale in (second, first):
        x = quantized_layers.Quantize(quantizers.Affine(8, scale=scale))(inputs)
        x = quantized_layers.QuantizedConv2D(2, 3, kernel_quantizer="lsq")(x)
        outputs.append(quantized_layers.Dequantize()(quantized_layers.Quantize("lsq")(x)))
    return calibrate(keras.Model(inputs, outputs), pixels(8, 8, 3))


def test_a_grid_of_its_own_beside_that_of_pixels_takes_pixels():
    """Steps of 0.7 end at 178.5: as codes of steps 1 the input says all of them, were it whole."""
    graph = assert_as_trained(two_grids(1.0, 0.7), pixels(8, 8, 3))
    assert graph.tensors[graph.inputs[0]].dtype == "uint8"


def test_a_grid_of_pixels_behind_one_that_holds_none_is_refused_by_name():
    with pytest.raises(NotExportable, match=r"Input image is read on two grids.*once for all"):
        integer_graph(two_grids(0.7, 1.0))


def test_the_code_of_a_copy_is_chosen_so_that_its_bias_is_whole():
    """Steps 1 in and out. As code 127 a shift of 0.3 is 38.1 units; as 120 it is 36 of them."""
    value = OnGrid("x", Grid(1.0, -128, 127, 8), 1.0, (1, 2, 2, 1))
    shifted = identity(value, "shift").affine(np.ones(1), np.array([0.3]))
    kernel, scale, bias = integer_product(shifted, value)
    assert (kernel.item(), bias.item()) == (120, 36)
    np.testing.assert_allclose(scale, 1 / 120, rtol=1e-6)  # float32


def test_codes_that_int8_does_not_hold_are_refused_by_name():
    def model(bits, kernel_bits):
        inputs = keras.Input((5,))
        x = quantized_layers.Quantize("lsq", bits=bits, name="q")(inputs)
        kernel = quantizers.get("lsq", bits=kernel_bits, role="kernel", axis=-1)
        x = quantized_layers.QuantizedDense(3, kernel_quantizer=kernel, name="dense")(x)
        x = quantized_layers.Dequantize()(quantized_layers.Quantize("lsq")(x))
        return calibrate(keras.Model(inputs, x), np.ones((4, 5), np.float32))

    integer_graph(model(8, 8))
    with pytest.raises(NotExportable, match="dense: kernel codes of 12 bits; files hold at most 8"):
        integer_graph(model(8, 12))
    with pytest.raises(NotExportable, match="q: codes of 12 bits; files hold at most 8"):
        integer_graph(model(12, 8))
