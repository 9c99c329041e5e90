"""From a trained model to a file: what is written, what is refused, and how it is said."""

import errno
import os
import re

import keras
import numpy as np
import pytest
from keras import ops

pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema

from keras_lowbit import calibrate, freeze, quantize_model
from tflite_export import NotExportable, check, convert, runtime

pytestmark = pytest.mark.runtime

K = keras.layers
SHAPE = (7, 5, 3)


def images(count=4, seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def operators(content):
    """Names of a file's operators, in order."""
    model = schema.ModelT.InitFromPackedBuf(content)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return [codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]


def body(x):
    """Convolution, pointwise convolution, residual addition, mean, dense."""
    x = K.Conv2D(4, 3, padding="same", activation="relu", name="stem")(x)
    y = K.Conv2D(4, 1, name="point")(x)
    x = K.Add(name="sum")([x, y])
    x = K.GlobalAveragePooling2D(name="mean")(x)
    return K.Dense(3, name="logits")(x)


def small():
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, body(inputs))


def trained(scheme="w4a4", model=None):
    return calibrate(quantize_model(model or small(), scheme), images())


def test_a_converted_model_matches_in_every_tensor():
    result = convert(trained(), verify=images(3, seed=1))
    assert result.mismatches == 0
    compared = result.verification.by_comparison
    assert len(compared) == 3
    assert all(count.compared > 0 for count in compared.values())
    assert {row["kernels"] for row in result.report["ops"]} == {"XNNPACK"}
    assert "0 wrong of" in str(result)


def test_nothing_is_claimed_without_images():
    result = convert(trained())
    assert result.mismatches is None
    assert "not verified" in str(result)


@pytest.mark.once
def test_one_weight_code_flipped_in_the_bytes_is_counted():
    from tflite_export.verify import verify

    result = convert(trained())
    (op,) = (op for op in result.graph if op.source == "point")
    stored = np.ascontiguousarray(op.kernel.transpose(3, 0, 1, 2)).tobytes()
    assert result.content.count(stored) == 1
    # The code of the largest input channel of the first output channel, one step aside.
    changed = bytes([stored[0] ^ 1]) + stored[1:]
    content = result.content.replace(stored, changed)
    found = verify(result.graph, content, images(8))
    assert found.wrong > 0
    assert found.by_tensor[op.output].wrong > 0
    assert found.by_tensor[op.inputs[0]].wrong == 0


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_frozen_model_exports_to_the_same_bytes(tmp_path, weights):
    model = trained()
    wanted = convert(model, weights=weights).content
    frozen = freeze(model, weights=weights)
    assert convert(frozen, weights=weights).content == wanted
    frozen.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    assert convert(loaded, weights=weights).content == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, r"frozen with weights='int8'. For 'int4' give weights to freeze"),
        ({"weights": "int4_all"}, r"frozen with weights='int8'. For 'int4_all' give weights"),
        ({"input_type": "uint8"}, r"frozen with input_type='float32'. For 'uint8'"),
        ({"output_type": "int8"}, r"frozen with output_type='float32'. For 'int8'"),
        ({"input_type": "int2"}, r"input_type must be one of"),
        ({"batch": 0}, r"batch must be a whole number"),
    ],
)
def test_a_frozen_model_is_not_something_else(options, message):
    with pytest.raises(ValueError, match=message):
        convert(freeze(trained()), **options)


@pytest.mark.parametrize("weights", ["int8", "int4", "int4_all"])
def test_a_file_of_a_frozen_model_says_what_its_kernels_are(weights):
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, body(K.Conv2D(4, 3)(K.Conv2D(4, 1)(inputs))))
    options = {"weights": weights, "input_type": "uint8", "output_type": "int8"}
    frozen = freeze(trained(model=model), **options)
    assert convert(frozen).weights == weights
    assert convert(frozen, **options).weights == weights


def test_where_no_kernel_fits_int4_its_files_are_those_of_int8():
    frozen = freeze(trained("w8a8"), weights="int4")
    assert convert(frozen).weights == "int8"
    assert convert(frozen, weights="int4").weights == "int4"


def test_a_frozen_model_takes_any_batch():
    model = trained()
    result = convert(freeze(model), batch=3, verify=images(6))
    assert result.content == convert(model, batch=3).content
    assert result.mismatches == 0


def test_a_trained_model_that_was_saved_exports_to_the_same_bytes(tmp_path):
    model = trained()
    model.save(tmp_path / "trained.keras")
    loaded = keras.models.load_model(tmp_path / "trained.keras")
    assert convert(loaded).content == convert(model).content


@pytest.mark.once
def test_int4_files_compute_the_codes_of_int8_files():
    model = trained()
    eight, four = (convert(model, weights=w, verify=images(2)) for w in ("int8", "int4"))
    stored = {op.source: op.storage for op in four.graph if op.kind == "fully_connected"}
    assert stored["point"] == "int4"
    assert eight.mismatches == four.mismatches == 0
    feeds = {eight.graph.inputs[0]: images(5)}
    first, second = runtime.run(eight.content, feeds), runtime.run(four.content, feeds)
    assert list(first) == list(second)
    for name, codes in first.items():
        np.testing.assert_array_equal(codes, second[name])


@pytest.mark.once
@pytest.mark.parametrize("kind", ["point", "dense"])
def test_an_odd_number_of_input_channels_stays_int8_where_int4_would_round_otherwise(kind):
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(5, 3, activation="relu")(inputs)
    x = K.Conv2D(4, 1, name="odd", activation="relu")(x) if kind == "point" else x
    x = K.Flatten()(x) if kind == "point" else K.Dense(4, name="odd", activation="relu")(x)
    model = keras.Model(inputs, K.Dense(2)(x))
    result = convert(trained(model=model), weights="int4", verify=images(8))
    assert {op.storage for op in result.graph if op.source == "odd"} == {"int8"}
    assert result.mismatches == 0


def test_batches_of_the_file_match():
    result = convert(trained(), batch=3, verify=images(6))
    assert result.graph.tensors[result.graph.inputs[0]].shape == (3, *SHAPE)
    assert result.mismatches == 0


def test_pixels_go_in_as_bytes_where_the_model_rescales():
    inputs = keras.Input(SHAPE, name="photo")
    model = keras.Model(inputs, body(K.Rescaling(1 / 127.5, -1.0)(inputs)))
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE)).astype(np.uint8)
    model = calibrate(quantize_model(model), pixels.astype(np.float32))
    result = convert(model, output_type="uint8", verify=pixels)
    assert runtime.Session(result.content).inputs == {"photo": np.dtype(np.uint8)}
    assert result.mismatches == 0
    # Reals in, codes out: the file gives what the trained model gives, within two codes.
    out = result.graph.tensors[result.graph.outputs[0]]
    codes = runtime.run(result.content, {"photo": pixels})[result.graph.outputs[0]]
    reals = (codes.astype(np.float32) - out.zero_point) * out.scale
    expected = ops.convert_to_numpy(model(pixels.astype(np.float32)))
    assert np.abs(reals - expected).max() <= 2.01 * out.scale


@pytest.mark.parametrize("ends", ["int8", "uint8"])
def test_ends_can_be_codes(ends):
    result = convert(trained(), input_type=ends, output_type=ends)
    low = np.iinfo(ends).min
    codes = np.random.default_rng(0).integers(low, low + 256, (3, *SHAPE)).astype(ends)
    verified = convert(trained(), input_type=ends, output_type=ends, verify=codes)
    assert verified.mismatches == 0
    session = runtime.Session(result.content)
    assert set(session.inputs.values()) == {np.dtype(ends)}


def test_several_inputs_and_outputs_match():
    first, second = keras.Input(SHAPE, name="first"), keras.Input(SHAPE, name="second")
    x = K.Conv2D(3, 3, activation="relu")(first)
    y = K.Conv2D(3, 3)(second)
    x = ops.add(x, y)
    model = keras.Model(
        [first, second], [K.Dense(2, name="a")(K.Flatten()(x)), K.Conv2D(2, 1, name="b")(x)]
    )
    feeds = [images(4), images(4, seed=1)]
    small_model = calibrate(quantize_model(model, "w4a4"), feeds)
    result = convert(small_model, verify=feeds)
    assert len(result.graph.inputs) == len(result.graph.outputs) == 2
    assert result.mismatches == 0


# --- what is refused ------------------------------------------------------------------------------


def test_an_uncalibrated_model_names_the_layer_and_the_way_out():
    with pytest.raises(NotExportable, match=r"is not calibrated\. Run keras_lowbit\.calibrate"):
        convert(quantize_model(small()))


def test_a_dynamic_image_size_is_refused():
    inputs = keras.Input((None, None, 3))
    x = K.GlobalAveragePooling2D()(K.Conv2D(3, 3, padding="same")(inputs))
    model = keras.Model(inputs, K.Dense(2)(x))
    model = calibrate(quantize_model(model), images())
    with pytest.raises(NotExportable, match=r"dynamic shape .*Build the model with keras\.Input"):
        convert(model)


def test_a_layer_left_float_is_refused_by_name():
    model = trained({"*": "w8a8", "point": None})
    with pytest.raises(NotExportable, match="point stayed float"):
        convert(model)


def test_an_unknown_layer_is_refused_by_name_with_what_to_write():
    inputs = keras.Input(SHAPE)
    x = K.LayerNormalization(name="strange")(K.Conv2D(4, 3, name="c")(inputs))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    model = calibrate(quantize_model(model), images())
    with pytest.raises(
        NotExportable, match=r"strange \(LayerNormalization\).*Write BatchNormalization"
    ):
        convert(model)


def test_check_names_every_objection_to_a_float_model():
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, activation="gelu", name="bent")(inputs)
    x = K.LayerNormalization(name="normed")(x)
    x = K.Conv2D(4, 1, name="fine")(x)
    x = K.UpSampling2D(interpolation="bilinear", name="larger")(x)
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    found = check(model)
    for name in ("gelu", "normed", "larger"):
        assert sum(name in sentence for sentence in found) == 1, found
    assert not any("fine" in sentence for sentence in found)


def test_check_finds_nothing_in_models_that_convert():
    assert check(small()) == []
    assert check(quantize_model(small(), "w4a4")) == []
    assert check(trained()) == []


def gated():
    """A ReLU's limit is known before any data."""
    inputs = keras.Input(SHAPE)
    x = K.Activation("silu")(K.ReLU(0.1)(K.Conv2D(4, 3)(inputs)))
    return keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))


def summed():
    """So is the range of an input."""
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, K.Add()([inputs, K.Conv2D(3, 3, padding="same")(inputs)]))


@pytest.mark.parametrize(("model_of", "largest"), [(gated, 1), (summed, 1e5)])
def test_check_of_a_model_without_data_says_nothing_about_scales(model_of, largest):
    """A scale that no data has set is 1; others are not."""
    model = quantize_model(model_of(), "w8a8", input_range=(0, largest))
    assert check(model) == []
    calibrate(model, largest * images())
    assert check(model) == []
    assert convert(model, verify=(largest * images()).astype("float32")).mismatches == 0


def test_check_of_a_calibrated_model_knows_its_scales():
    x = inputs = keras.Input(SHAPE)
    x = K.Add(name="sum")([K.Conv2D(4, 3, name="c")(x), K.Conv2D(4, 3)(x)])
    model = calibrate(quantize_model(keras.Model(inputs, x), "w8a8"), images())
    model.get_layer("c_quantize").quantizer.scale.assign(1e6)
    assert any(sentence.startswith("sum: the scale of") for sentence in check(model))


def test_check_needs_a_known_target():
    with pytest.raises(ValueError, match=r"Unknown target 'andriod'.*'android'"):
        check(small(), "andriod")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "andriod"}, "Did you mean 'android'"),
        ({"weights": "int2"}, r"weights must be one of .*'int4_all'.*Got 'int2'"),
        ({"input_type": "int4"}, "input_type must be one of"),
        ({"output_type": "int16"}, "output_type must be one of"),
        ({"batch": 0}, "batch must be a whole number of at least 1. Got 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(trained(), **arguments)


def test_verification_images_must_fit_the_files_input():
    model = trained()
    with pytest.raises(ValueError, match="shape"):
        convert(model, verify=images()[:, :-1])
    with pytest.raises(ValueError, match="takes uint8: the images hold other values"):
        convert(model, input_type="uint8", verify=images())
    with pytest.raises(ValueError, match="the images hold other values"):
        convert(model, verify=np.full_like(images(), np.nan))
    with pytest.raises(ValueError, match=r"at least one image is needed. Got \(0, 7, 5, 3\)"):
        convert(model, verify=images()[:0])
    with pytest.raises(ValueError, match="Got 2 arrays"):
        convert(model, verify=[images(), images()])


def test_verification_images_may_be_float64():
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    assert convert(trained(), verify=pixels / 255.0).mismatches == 0


def test_the_old_target_refuses_int4_dense_layers_by_name():
    with pytest.raises(NotExportable, match=r"point \(fully_connected\): .*weights='int8'"):
        convert(trained(), target="builtin", weights="int4")


@pytest.mark.parametrize(
    ("move", "most"),
    [
        (lambda x: ops.pad(x, ((0, 0),) * (len(x.shape) - 2) + ((1, 0), (0, 0))), (6, 5)),
        (lambda x: x[..., :2], (8, 5)),
        (lambda x: ops.transpose(x, (0, *range(len(x.shape) - 1, 0, -1))), (8, 6)),
        (lambda x: K.Concatenate()([x, x]), (6, 6)),
    ],
    ids=["pad", "slice", "transpose", "concatenation"],
)
def test_more_axes_than_kernels_take_are_refused_by_name(move, most):
    """Counts of axes are those of LiteRT's kernels, and of tflite-runtime 2.14's."""
    for axes in (5, 6, 7):
        inputs = keras.Input((6, 3))
        x = K.Dense(4, activation="relu")(inputs)
        x = move(K.Reshape((*(1,) * (axes - 4), 2, 3, 4))(x))
        model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
        for target, limit in zip(("android", "builtin"), most, strict=True):
            found = check(model, target)
            if axes <= limit:
                assert found == []
                continue
            (sentence,) = found
            assert (
                f"it takes at most {limit} axes there, that of images counted. Got (1, " in sentence
            )
            assert "join axes with a Reshape before it" in sentence
        if axes <= min(most):
            rows = np.random.default_rng(0).normal(size=(4, 6, 3)).astype("float32")
            small = calibrate(quantize_model(model, "w8a8"), rows)
            result = convert(small, "builtin")
            runtime.open_interpreter(result.content, builtin_kernels=True)


def test_the_edge_tpu_takes_int8_kernels_and_one_image():
    assert check(small(), "coral") == []
    assert convert(trained(), target="coral", verify=images(2)).mismatches == 0
    with pytest.raises(NotExportable, match=r"point \(fully_connected\): .*weights='int8'"):
        convert(trained(), target="coral", weights="int4")
    with pytest.raises(NotExportable, match="1 image at a time there"):
        convert(trained(), target="coral", batch=2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: K.Conv2D(2, 3, dilation_rate=(2, 1), name="odd"), r"odd .*Got \(2, 1\)"),
        (lambda: K.Dense(2, name="odd"), r"odd .*one-dimensional.*Got \(7, 5, 2\).*1x1"),
        (lambda: K.Softmax(name="odd"), r"odd .*softmax over one dimension.*Got \(7, 5, 3\)"),
        (lambda: K.Reshape((5, 7, 1, 3), name="odd"), r"odd .*three innermost.*\(1, 5, 7, 1, 3\)"),
    ],
)
def test_what_the_edge_tpu_would_leave_to_the_cpu_is_named_before_training(layer, message):
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, layer()(K.Conv2D(3, 1, name="fine")(inputs)))
    assert check(model) == []
    found = check(model, "coral")
    assert re.search(message, found[0])
    assert {line.split()[0] for line in found} == {"odd"}
    with pytest.raises(NotExportable, match=message) as refused:
        convert(trained(model=model), target="coral")
    assert str(refused.value).splitlines()[1:] == [f"  {line}" for line in found]


@pytest.mark.parametrize("channels", [(1, 2), (0, 2), (1, 0)])
def test_channels_are_padded_by_concatenation_for_the_edge_tpu(channels):
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 1, activation="relu")(inputs)
    outputs = keras.ops.pad(x, ((0, 0), (1, 1), (2, 0), channels))
    model = trained(model=keras.Model(inputs, outputs))
    result = convert(model, target="coral", verify=images(2))
    assert result.mismatches == 0
    kinds = operators(result.content)
    assert kinds.count("CONCATENATION") == sum(n > 0 for n in channels)
    assert kinds.count("PAD") == 1  # height and width
    assert "CONCATENATION" not in operators(convert(model).content)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    result = convert(trained())
    path = result.save(tmp_path / "net.tflite")
    assert path.read_bytes() == result.content
    with pytest.raises(ValueError, match=r"cannot be written: there is no folder .*nowhere\. Make"):
        result.save(tmp_path / "nowhere" / "net.tflite")
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]


def test_a_disk_that_refuses_is_no_bad_argument(tmp_path, monkeypatch):
    result = convert(trained())
    path = result.save(tmp_path / "net.tflite")

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=r"No space left on device; nothing was written.*net\.tflite'"
    ):
        result.save(path)
    assert path.read_bytes() == result.content
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]


@pytest.mark.once
def test_a_sum_outside_the_runtimes_range_of_scales_becomes_exact():
    """A tensor that is 2^-12 of the sum it goes into: the runtime adds ratios from 2^-10 on."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(2, 1, name="tiny", activation="relu")(inputs)
    y = K.Conv2D(2, 1, name="large")(inputs)
    model = keras.Model(inputs, K.Conv2D(2, 1, name="out")(K.Add(name="sum")([x, y])))
    tiny = model.get_layer("tiny")
    tiny.set_weights([w * 2.0**-12 for w in tiny.get_weights()])
    result = convert(trained("w8a8", model), verify=images(4))
    assert result.mismatches == 0
    (op,) = (op for op in result.graph if op.kind == "add")
    scales = [result.graph.tensors[name].scale for name in (*op.inputs, op.output)]
    # Scales are written as float32.
    assert min(scales[:2]) / scales[2] == pytest.approx(2.0**-9, rel=1e-5)


@pytest.mark.once
def test_a_channel_that_saturates_on_every_sum_is_exact():
    """Variance 0 in a batch norm: one unit of a sum is thousands of the output's codes."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(4, 3, name="c", use_bias=False)(inputs)
    x = K.ReLU(6.0)(K.BatchNormalization(name="bn", epsilon=1e-14)(x))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(x)))
    norm = model.get_layer("bn")
    norm.moving_variance.assign([0.0, 1e-6, 0.01, 1.0])
    result = convert(trained("w2a2", model), verify=images(4))
    assert result.mismatches == 0
    (op,) = (op for op in result.graph if op.source == "c")
    tensors = result.graph.tensors
    multiplier = tensors[op.inputs[0]].scale * op.kernel_scale / tensors[op.output].scale
    assert multiplier.max() < 256
    assert multiplier.max() > 250


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_tensors_that_end_at_different_values_can_be_concatenated(scheme):
    """A ReLU6 that ends below the grid's last code beside a ReLU that uses all of them."""
    inputs = keras.Input(SHAPE)
    x = K.Conv2D(3, 1, name="short")(inputs)
    y = K.Conv2D(3, 1, name="long")(inputs)
    x = K.Concatenate(name="both")([K.ReLU(6.0)(x), K.ReLU()(y)])
    model = keras.Model(inputs, K.Conv2D(2, 1, name="out")(x))
    for name, size in (("short", 10), ("long", 40)):
        layer = model.get_layer(name)
        layer.set_weights([size * w for w in layer.get_weights()])
    result = convert(trained(scheme, model), verify=images(4))
    assert result.mismatches == 0


def test_what_a_file_cannot_do_with_batches_is_named_before_training():
    inputs = keras.Input((6, 6, 3), name="image")
    parts = [keras.layers.Conv2D(3, 1)(inputs) for _ in range(2)]
    side = keras.layers.Conv2D(2, 1)(keras.layers.Concatenate(axis=0, name="join")(parts))
    (found,) = check(keras.Model(inputs, side))
    assert found.startswith("join: it joins images of a batch")
    flat = keras.layers.Dense(2)(keras.ops.reshape(parts[0], (-1, 3)))
    (found,) = check(keras.Model(inputs, flat))
    assert "(6, 6, 3) for each image becomes (3,): it mixes the images of a batch" in found
    kept = keras.layers.Dense(2)(keras.ops.reshape(parts[0], (-1, 36, 3)))
    assert check(keras.Model(inputs, kept)) == []


def test_inputs_that_nothing_reads_are_named_before_training():
    inputs, extra = keras.Input((6, 6, 3), name="image"), keras.Input((4,), name="extra")
    model = keras.Model([inputs, extra], keras.layers.Conv2D(2, 1)(inputs))
    assert check(model) == ["Input extra is not read by any layer. Build the model without it"]


def test_images_that_fill_no_batch_are_counted_as_they_were_given():
    with pytest.raises(
        ValueError, match=r"A file of batch 3 takes that many images at a time\. Got 10"
    ):
        convert(trained(), batch=3, verify=images(10))
