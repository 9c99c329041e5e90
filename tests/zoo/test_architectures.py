"""Float architectures: parameters, sizes, ImageNet weights; all but one can be exported."""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lowbit as klb
from keras_lowbit import zoo
from keras_lowbit.zoo.architectures import imagenet
from keras_lowbit.zoo.architectures.blocks import scaled

K = keras.layers
# A checkout may have this folder beside it; the file is keras.applications' own.
FLOAT_WEIGHTS = (
    Path(__file__).parents[3] / "shared" / "data" / "float" / "mobilenet_v2_1.0_224.weights.h5"
)

# Trainable parameters at 1,000 classes, and who says so.
PARAMETERS = [
    ("resnet18", {}, 11_689_512, "torchvision, resnet18: num_params"),
    ("resnet34", {}, 21_797_672, "torchvision, resnet34: num_params"),
    # keras.applications: 25,583,592, of which 26,560 are biases in front of batch norms.
    ("resnet50", {}, 25_557_032, "torchvision, resnet50: num_params"),
    ("mobilenet_v1", {}, 4_231_976, "keras.applications.MobileNet: trainable (paper: 4.2 M)"),
    ("mobilenet_v1", {"alpha": 0.5}, 1_331_592, "keras.applications.MobileNet: trainable"),
    ("mobilenet_v2", {}, 3_504_872, "keras.applications.MobileNetV2: trainable (paper: 3.4 M)"),
    ("mnasnet_b1", {}, 4_383_312, "torchvision, mnasnet1_0: num_params"),
    ("mnasnet_b1", {"alpha": 0.75}, 3_170_208, "torchvision, mnasnet0_75: num_params"),
    ("mnasnet_b1", {"alpha": 0.5}, 2_218_512, "torchvision, mnasnet0_5: num_params"),
    ("mnasnet_a1", {}, 3_887_038, "osmr/imgclsmob, table of models (paper: 3.9 M)"),
    # torchvision's alexnet has 61,100,840, of them 1,152 + 8,192 biases, which give way to a gamma
    # and a beta each: 61,100,840 - 9,344 + 2 * 9,344.
    ("alexnet_bn", {}, 61_110_184, "torchvision, alexnet: num_params; by hand"),
]
# Millions at other widths, from the README of MnasNet in tensorflow/tpu.
MILLIONS = [("mnasnet_a1", 0.35, 1.7), ("mnasnet_a1", 1.4, 6.1)]
# Widths that keep a test quick.
TINY = {
    "resnet18": 0.125,
    "resnet34": 0.125,
    "resnet50": 0.125,
    "mobilenet_v1": 0.25,
    "mobilenet_v2": 0.1,
    "mnasnet_a1": 0.1,
    "mnasnet_b1": 0.1,
    "alexnet_bn": 0.02,
}


def trainable(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


def tiny(name, shape=(32, 32, 3), **options):
    return zoo.build(name, **{"input_shape": shape, "classes": 5, "alpha": TINY[name], **options})


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype("float32")


def outputs(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


# --- parameters and sizes ---------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(("name", "options", "count", "source"), PARAMETERS)
def test_parameters_are_as_published(name, options, count, source):
    assert trainable(zoo.build(name, **options)) == count, source


@pytest.mark.once
@pytest.mark.parametrize(("name", "alpha", "millions"), MILLIONS)
def test_parameters_at_other_widths_round_to_the_published_ones(name, alpha, millions):
    assert round(trainable(zoo.build(name, alpha=alpha)) / 1e6, 1) == millions


@pytest.mark.once
def test_the_table_of_parameters_holds_every_architecture():
    told = {name for name, *_ in PARAMETERS}
    assert told | {"resnet8", "resnet20", "resnet32", "resnet56"} == set(zoo.ARCHITECTURES)


@pytest.mark.once
@pytest.mark.parametrize(
    ("filters", "alpha", "rounded"),
    [
        (32, 1.0, 32),
        (24, 0.35, 8),  # 8.4
        (32, 0.35, 16),  # 11.2: 8 would be less than nine tenths of it
        (96, 0.35, 32),  # 33.6
        (16, 1.4, 24),  # 22.4
        (96, 1.4, 136),  # 134.4
        (16, 0.1, 8),
    ],
)
def test_widths_are_multiples_of_eight(filters, alpha, rounded):
    assert scaled(filters, alpha) == rounded


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(set(TINY) - {"alexnet_bn"}))
def test_224_pixels_end_as_7_and_32_pixels_as_4(name):
    def last_size(model):
        return tuple(model.get_layer("pool").input.shape[1:3])

    full, small = tiny(name, (224, 224, 3)), tiny(name)
    assert (last_size(full), last_size(small)) == ((7, 7), (4, 4))
    if not name.startswith("resnet"):
        # Strides differ and nothing else: weights of one fit the other.
        assert [w.shape for w in full.weights] == [w.shape for w in small.weights]


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "small", "read"),
    [((224, 224, 3), None, (6, 6)), ((32, 32, 3), None, (4, 4)), ((64, 64, 3), False, (1, 1))],
)
def test_alexnet_reads_the_last_feature_map_whole(shape, small, read):
    model = tiny("alexnet_bn", shape, small=small)
    assert tuple(model.get_layer("flatten").input.shape[1:3]) == read


@pytest.mark.once
def test_up_to_64_pixels_the_small_variant_is_built():
    sizes = {64: 8, 65: 3}  # 64 / 8, and 65 / 32 rounded up
    for pixels_a_side, last in sizes.items():
        model = tiny("mobilenet_v1", (pixels_a_side, 33, 3))
        assert model.get_layer("pool").input.shape[1] == last


@pytest.mark.parametrize("name", sorted(TINY))
def test_layers_are_named_for_reading_and_for_patterns(name):
    model = tiny(name)
    names = {layer.name for layer in model.layers}
    assert model.name == name
    for layer in model.layers:
        assert layer.name.replace("_", "").isalnum()
        assert layer.name == layer.name.lower()
        if isinstance(layer, (K.Conv2D, K.DepthwiseConv2D)) and not layer.use_bias:
            assert f"{layer.name}_bn" in names
    assert model.layers[-1].name == "logits"


@pytest.mark.parametrize("name", sorted(TINY))
def test_one_image_gives_logits_and_features(name):
    model = tiny(name)
    made = outputs(model, pixels(2, 32, 32, 3))
    assert made.shape == (2, 5)
    assert np.isfinite(made).all()
    assert not np.allclose(made[0], made[1], rtol=1e-4)  # far more than float32
    features = tiny(name, include_top=False)
    assert features.output_shape == model.layers[-1].input.shape


@pytest.mark.parametrize("name", ["resnet18", "mnasnet_a1"])
def test_a_saved_model_computes_the_same(name, tmp_path):
    model, images = tiny(name), pixels(1, 32, 32, 3)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert np.array_equal(outputs(again, images), outputs(model, images))


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("mobilenet_v3", {}, "Did you mean 'mobilenet_v2'?"),
        ("mobilenet_v2", {"widht": 2}, "Unknown option of mobilenet_v2 'widht'"),
        ("mobilenet_v2", {"aplha": 2}, "Did you mean 'alpha'?"),
        ("resnet20", {"alpha": 2}, "Unknown option of resnet20 'alpha'"),
        (
            "mnasnet_b1",
            {"alpha": 0},
            "the width multiplier, must be a finite number, above 0. Got 0",
        ),
        ("mnasnet_b1", {"alpha": float("nan")}, "must be a finite number, above 0. Got nan"),
        ("resnet8", {"classes": True}, "classes must be a whole number of at least 1. Got True"),
        ("resnet18", {"classes": 0}, "classes must be a whole number of at least 1. Got 0"),
        ("resnet18", {"input_shape": (32, 32)}, r"\(height, width, channels\).* Got \(32, 32\)"),
        ("resnet18", {"input_shape": (32, 32, 1)}, r"takes RGB images .*Got \(32, 32, 1\)"),
        ("alexnet_bn", {"input_shape": (62, 80, 3)}, "images of 63 pixels a side or more"),
        ("alexnet_bn", {"weights": "imagenet", "alpha": 0.02}, "no ImageNet weights of alexnet_bn"),
        ("mobilenet_v2", {"weights": "imagenet", "alpha": 0.1}, r"for alpha in \(0.35, .* Got 0.1"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, told):
    with pytest.raises(ValueError, match=told):
        zoo.build(name, **options)


@pytest.mark.once
def test_classes_may_be_counted_by_numpy():
    assert zoo.build("resnet8", classes=np.max([1, 2]) + 1).output_shape == (None, 3)


# --- ImageNet weights of keras.applications -----------------------------------------------------


def disturbed(model, gains=(1.0, 2.0)):
    """Biases and batch norms that are not 0 and 1; `gains` that keep 28 to 53 layers awake."""
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(0, 0.3, layer.bias.shape))
        if isinstance(layer, K.DepthwiseConv2D):
            # Keras' own initializer leaves nothing of the signal for batch norm's epsilon.
            layer.kernel.assign(rng.normal(0, 0.5, layer.kernel.shape))
        if isinstance(layer, K.BatchNormalization):
            shape = layer.gamma.shape
            layer.gamma.assign(rng.uniform(*gains, shape) * rng.choice([-1, 1], shape))
            layer.beta.assign(rng.normal(0.2, 0.2, shape))
            layer.moving_mean.assign(rng.normal(0, 0.3, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, shape))
    return model


def applied(name, twin, images):
    """Outputs of a model of keras.applications for pixels, its own preprocessing in front."""
    module = {"mobilenet_v1": "mobilenet", "resnet50": "resnet50"}.get(name, name)
    prepare = getattr(keras.applications, module).preprocess_input
    return outputs(twin, prepare(images.copy()))


@pytest.mark.parametrize(
    ("name", "alpha", "gains"),
    # Nothing but small gains bounds the sums of a ResNet.
    [
        ("mobilenet_v1", 0.25, (1.0, 2.0)),
        ("mobilenet_v2", 0.35, (1.0, 2.0)),
        ("resnet50", 1.0, (0.5, 1.2)),
    ],
)
def test_weights_of_keras_applications_give_the_same_outputs(name, alpha, gains):
    twin = disturbed(imagenet.TWINS[name].make(alpha=alpha, size=32), gains)
    model = zoo.build(name, input_shape=(32, 32, 3), small=False, alpha=alpha)
    images = pixels(2, 32, 32, 3)
    imagenet.copy(twin, model)
    wanted = applied(name, twin, images)
    # Float32 sums in another order, through 28 to 53 layers: 1e-6 of a layer's values each.
    assert np.abs(outputs(model, images) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    # Two images of noise differ by far more than that, so that what they are made of counts.
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(("classes", "has_head"), [(1000, True), (7, False)])
def test_imagenet_weights_come_from_keras_applications(monkeypatch, classes, has_head):
    asked, real = {}, keras.applications.MobileNetV2

    def fake(**options):
        asked.update(options)
        asked["model"] = disturbed(real(**{**options, "weights": None}))
        return asked["model"]

    monkeypatch.setattr(keras.applications, "MobileNetV2", fake)
    model = zoo.build(
        "mobilenet_v2", weights="imagenet", alpha=0.35, input_shape=(96, 96, 3), classes=classes
    )
    assert asked["weights"] == "imagenet"
    assert (asked["alpha"], asked["input_shape"]) == (0.35, (96, 96, 3))
    assert asked["include_top"] == has_head
    stem = asked["model"].get_layer("Conv1")
    assert np.array_equal(model.get_layer("stem").kernel, stem.kernel)
    assert model.output_shape == (None, classes)


@pytest.mark.once
def test_without_a_network_one_error_names_the_way_out(monkeypatch):
    def offline(**options):
        raise Exception("URL fetch failure on mobilenet_1_0_224_tf.h5")

    monkeypatch.setattr(keras.applications, "MobileNet", offline)
    with pytest.raises(ValueError, match=r"cache \(~/.keras/models\)") as caught:
        zoo.build("mobilenet_v1", weights="imagenet")
    assert "URL fetch failure" in str(caught.value)
    way_out = (
        "keras.applications.MobileNet(weights='imagenet').save_weights('mobilenet_v1.weights.h5')"
    )
    assert way_out in str(caught.value)


def test_weights_are_read_from_the_home_folder(tmp_path, monkeypatch):
    saved = zoo.build("resnet8")
    saved.save_weights(tmp_path / "w.weights.h5")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = zoo.build("resnet8", weights="~/w.weights.h5")
    for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_file_of_keras_applications_is_read(tmp_path):
    # The way out of that error: its head is a convolution, so the file does not fit as it is.
    twin = disturbed(imagenet.TWINS["mobilenet_v1"].make(alpha=0.25, size=32))
    twin.save_weights(tmp_path / "twin.weights.h5")
    options = {"input_shape": (32, 32, 3), "small": False, "alpha": 0.25}
    model = zoo.build("mobilenet_v1", weights=tmp_path / "twin.weights.h5", **options)
    mapped = zoo.build("mobilenet_v1", **options)
    imagenet.copy(twin, mapped)
    for ours, wanted in zip(model.weights, mapped.weights, strict=True):
        assert np.array_equal(ours, wanted), ours.path
    with pytest.raises(ValueError, match="holds neither weights of mobilenet_v1 nor of"):
        zoo.build("mobilenet_v1", weights=tmp_path / "twin.weights.h5", alpha=0.5)


@pytest.mark.once
def test_another_width_is_refused_by_the_layer():
    twin = imagenet.TWINS["mobilenet_v1"].make(alpha=0.25, size=32)
    with pytest.raises(ValueError, match=r"stem.kernel has the shape \(3, 3, 3, 16\), .* 8\)"):
        imagenet.copy(twin, tiny("mobilenet_v1", alpha=0.5))


@pytest.mark.skipif(not FLOAT_WEIGHTS.exists(), reason="no float weights beside the checkout")
def test_the_stored_mobilenet_v2_weights_are_read():
    options = {"input_shape": (32, 32, 3), "weights": None, "classifier_activation": None}
    twin = keras.applications.MobileNetV2(**options)
    twin.load_weights(FLOAT_WEIGHTS)
    model = zoo.build("mobilenet_v2", input_shape=(32, 32, 3), small=False, weights=FLOAT_WEIGHTS)
    images = pixels(2, 32, 32, 3)
    wanted = applied("mobilenet_v2", twin, images)
    # Float32 sums in another order, through 53 layers.
    assert np.abs(outputs(model, images) - wanted).max() <= 1e-4 * np.abs(wanted).max()


# --- quantization and export --------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (32, 32, 3)) for name in sorted(TINY)]
    # These are other layers above 64 pixels; mobile nets have other strides only.
    + [(name, (67, 65, 3)) for name in ("alexnet_bn", "resnet18", "resnet50")],
)
def test_nothing_stands_against_exporting_the_quantized_net(name, shape):
    tflite_export = pytest.importorskip("tflite_export")
    quantized = klb.quantize_model(tiny(name, shape), "w4a4")
    assert tflite_export.check(quantized) == []
    left = [x.name for x in quantized.layers if type(x) in (K.Conv2D, K.DepthwiseConv2D, K.Dense)]
    assert left == []


@pytest.mark.slow
@pytest.mark.runtime
@pytest.mark.parametrize("name", sorted(TINY))
def test_no_code_of_the_exported_net_differs(name):
    tflite_export = pytest.importorskip("tflite_export")
    images = pixels(4, 32, 32, 3)
    quantized = klb.quantize_model(tiny(name), "w4a4")
    klb.calibrate(quantized, images)
    result = tflite_export.convert(
        quantized, weights="int4", input_type="uint8", verify=images[:2].astype("uint8")
    )
    assert result.mismatches == 0
