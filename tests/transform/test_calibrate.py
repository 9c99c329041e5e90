import gc
import itertools
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers, walk
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.quantizers import get as quantizer_of
from keras_lowbit.transform import calibrate, quantize_model, reestimate_batchnorm
from keras_lowbit.transform.ready import uncalibrated
from keras_lowbit.transform.reestimate import never_trained

K = keras.layers


def net(scheme="w8a8", **kwargs):
    x = inputs = keras.Input((6, 5, 3), name="image")
    x = K.Conv2D(4, 3, name="conv")(x)
    x = K.GlobalAveragePooling2D(name="pool")(K.ReLU(name="relu")(x))
    return quantize_model(keras.Model(inputs, K.Dense(2, name="head")(x)), scheme, **kwargs)


def images(n=8, low=0.0, high=1.0):
    return np.random.default_rng(0).uniform(low, high, (n, 6, 5, 3)).astype("float32")


def quantizers(model):
    return {x.name: x.quantizer for x in model.layers if isinstance(x, layers.Quantize)}


def scales(model):
    return {name: float(ops.convert_to_numpy(q.scale)) for name, q in quantizers(model).items()}


def test_every_grid_is_calibrated_and_the_model_returned():
    model = net()
    assert uncalibrated(model) == list(quantizers(model))
    assert calibrate(model, images()) is model
    assert uncalibrated(model) == []
    assert all(scale > 0 for scale in scales(model).values())


def test_minmax_scales_are_the_range_over_the_codes():
    inputs = keras.Input((4,))
    x = layers.Quantize(bits=4, signed=False, name="q")(inputs)
    model = keras.Model(inputs, layers.Dequantize()(x))
    data = np.array([[0.0, 1.0, 2.0, 3.0], [0.5, 4.5, 1.0, 0.0]], "float32")
    calibrate(model, data, method="minmax", batch_size=1)
    # 4.5, the largest of both batches, over 15 codes
    np.testing.assert_allclose(scales(model)["q"], 0.3, rtol=1e-6)


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_arrays_and_iterables_give_the_same_scales(method):
    first, second = net(), net()
    second.set_weights(first.get_weights())
    data = images(10)
    calibrate(first, data, method=method, batch_size=4)
    # a data set yields batches, here with targets
    calibrate(second, [(data[i : i + 4], np.zeros(4)) for i in (0, 4, 8)], method=method)
    assert scales(first) == scales(second)


def test_new_grids_alone_still_want_images_of_the_old_ones_range():
    model = calibrate(net(input_range=(0, 255)), images(high=255.0))
    before = scales(model)
    with pytest.raises(
        ValueError, match=r"image_quantize.*the images span 0.999 codes of a grid of 256"
    ):
        calibrate(model, images(), only_new=True)
    assert scales(model) == before
    # Else the grid quantizes while new ones look.
    model.get_layer("pool_quantize").quantizer.calibrated.assign(0.0)
    calibrate(model, images(high=255.0), only_new=True)
    assert uncalibrated(model) == []
    assert scales(model)["image_quantize"] == before["image_quantize"]


def grid_alone(quantizer):
    """A model that puts its input on a grid."""
    inputs = keras.Input((100, 50, 1))
    return keras.Model(inputs, layers.Dequantize()(layers.Quantize(quantizer, name="q")(inputs)))


@pytest.mark.parametrize(
    ("name", "options", "method", "share", "samples"),
    [
        ("lsq", {}, "percentile", 99.99, 200_000),
        ("percentile", {"percentile": 99.0}, "mse", 99.0, 10_000),
    ],
)
def test_a_sample_keeps_the_shares_of_the_values(name, options, method, share, samples):
    # Heavy tails: the greatest value is far beyond where 99.99 % end.
    data = np.abs(np.random.default_rng(1).standard_t(3, (100, 100, 50, 1)).astype("float32"))
    model = grid_alone(quantizer_of(name, bits=8, role="activation", **options))
    calibrate(model, data, method=method, samples=samples)
    reach = 127 * float(ops.convert_to_numpy(model.get_layer("q").quantizer.scale))
    # The share ends at the 20th value of one sample and at the 100th of the other. Such a place
    # varies by a third of 22 % and of 10 %, as tails fall with the third power: 3 deviations.
    assert abs(reach / np.percentile(data, share) - 1) < (0.22 if share > 99.9 else 0.1)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_sample_knows_the_ends_of_all_images(method):
    data = np.random.default_rng(0).uniform(-1, 1, (20, 100, 50, 1)).astype("float32")
    data[7, 3, 2], data[11, 5, 1] = -5.0, 10.0
    model = grid_alone(quantizer_of("affine", bits=8))
    calibrate(model, data, method=method, samples=1000)
    assert float(ops.convert_to_numpy(model.get_layer("q").quantizer.scale)) == np.float32(15 / 255)


def test_activations_are_float_while_calibrate_looks():
    model = net("w8a2")
    calibrate(model, images(), method="minmax")
    first = scales(model)
    calibrate(model, images(), method="minmax")
    assert scales(model) == first
    assert all(q.observer is None for q in quantizers(model).values())


def test_kernels_and_statistics_are_left_alone():
    inputs = keras.Input((6, 5, 3))
    x = K.BatchNormalization(name="bn")(K.Conv2D(4, 3, name="conv")(inputs))
    model = quantize_model(keras.Model(inputs, x), "w4a4")
    kept = [*model.get_layer("conv").weights, *model.get_layer("bn").weights]
    before = [ops.convert_to_numpy(w).copy() for w in kept]
    calibrate(model, images())
    for old, variable in zip(before, kept, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))


def test_layers_with_quantizers_of_their_own_are_calibrated():
    inputs = keras.Input((6, 5, 3))
    x = layers.QuantizedSeparableConv2D(4, 3, input_quantizer="lsq", name="s")(inputs)
    model = keras.Model(inputs, x)
    assert uncalibrated(model) == ["s"]
    calibrate(model, images())
    assert uncalibrated(model) == []
    assert float(ops.convert_to_numpy(model.get_layer("s").between_quantizer.scale)) != 1.0


def test_several_inputs_take_a_list():
    one, two = keras.Input((3,), name="one"), keras.Input((4,), name="two")
    x = K.Concatenate()([K.Dense(2)(one), K.Dense(2)(two)])
    model = quantize_model(keras.Model([one, two], x), "w8a8")
    random = np.random.default_rng(0)
    data = [random.normal(size=(5, n)).astype("float32") for n in (3, 4)]
    calibrate(model, data, batch_size=2)
    assert uncalibrated(model) == []
    with pytest.raises(ValueError, match=r"The model has 2 inputs\. Got 1 arrays"):
        calibrate(model, data[0])
    with pytest.raises(ValueError, match=r"All inputs need as many images\. Got \[5, 3\]"):
        calibrate(model, [data[0], data[1][:3]])


def two_inputs():
    one, two = keras.Input((3,), name="one"), keras.Input((4,), name="two")
    model = keras.Model([two, one], K.Concatenate(name="both")([K.Dense(2)(one), K.Dense(2)(two)]))
    return quantize_model(model, "w8a8")


def test_several_inputs_are_given_by_name_at_once_or_batch_by_batch():
    random = np.random.default_rng(0)
    data = {n: random.normal(size=(6, k)).astype("float32") for n, k in (("one", 3), ("two", 4))}
    first, *others = (two_inputs() for _ in range(4))
    calibrate(first, [data["two"], data["one"]])
    halves = [{n: a[i : i + 3] for n, a in data.items()} for i in (0, 3)]
    forms = (data, (half for half in halves), [(half, np.zeros(3)) for half in halves])
    for model, given in zip(others, forms, strict=True):
        model.set_weights(first.get_weights())
        calibrate(model, given)
        assert scales(model) == scales(first)
    with pytest.raises(ValueError, match=r"inputs \['two', 'one'\]\. Got \['one', 'three'\]"):
        calibrate(two_inputs(), {"one": data["one"], "three": data["two"]})


class Endless:
    """Batches without end or length, of which it counts how many are held at a time."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        for batch in itertools.repeat(images(4)):
            self.read += 1
            yield batch


def test_steps_end_what_has_no_end():
    endless, model, other = Endless(), net(), net()
    other.set_weights(model.get_weights())
    calibrate(model, endless, steps=3)
    assert endless.read == 3
    calibrate(other, np.concatenate([images(4)] * 3), batch_size=4)
    assert scales(model) == scales(other)
    with pytest.raises(ValueError, match=r"steps must be .* at least 1\. Got 0"):
        calibrate(model, endless, steps=0)


def test_a_data_set_that_says_it_has_no_end_asks_for_steps():
    class Repeated(Endless):
        def cardinality(self):
            return -1

    with pytest.raises(ValueError, match="no end: say how many batches to read by steps="):
        calibrate(net(), Repeated())
    assert uncalibrated(calibrate(net(), Repeated(), steps=2)) == []


def test_batches_of_a_known_number_are_read_one_by_one():
    alive = []

    class Sized:
        def __len__(self):
            return 5

        def __iter__(self):
            for _ in range(5):
                gc.collect()
                alive.append(sum(ref() is not None for ref in born))
                batch = images(4)
                born.append(weakref.ref(batch))
                yield batch
                del batch

    born = []
    calibrate(net(), Sized())
    assert len(alive) == 5
    assert max(alive) <= 2  # the one in use, and the last not yet let go of


def test_an_uncalibrated_model_is_refused_at_export_with_the_way_out():
    with pytest.raises(ValueError, match=r"image_quantize is not calibrated\. Run .*calibrate"):
        integer_graph(net())


def test_one_uncalibrated_grid_is_enough_to_refuse():
    model = calibrate(net(), images())
    model.get_layer("pool_quantize").quantizer.calibrated.assign(0.0)
    with pytest.raises(ValueError, match="pool_quantize is not calibrated"):
        integer_graph(model)


def test_kernels_that_are_no_numbers_are_refused_as_such():
    model = calibrate(net(), images())
    layer = model.get_layer("conv")
    layer.kernel.assign(np.full(layer.kernel.shape, np.nan, "float32"))
    with pytest.raises(ValueError, match="conv: NaN or infinite weights"):
        integer_graph(model)


@pytest.mark.parametrize("scale", [-0.25, 0.0, np.nan])
def test_a_scale_that_training_broke_is_refused_at_export_by_name(scale):
    model = calibrate(net(), images())
    model.get_layer("pool_quantize").quantizer.scale.assign(scale)
    with pytest.raises(ValueError, match=r"pool_quantize.*: the scale is .*ScaleGuard"):
        integer_graph(model)


def by_hand():
    x = inputs = keras.Input((6, 5, 3))
    x = layers.QuantizedSeparableConv2D(
        4, 3, input_quantizer="lsq", output_quantizer="lsq", name="s"
    )(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("argument", ["input_quantizer", "between_quantizer", "output_quantizer"])
def test_an_uncalibrated_grid_inside_a_layer_is_refused(argument):
    model = calibrate(by_hand(), images())
    integer_graph(model)
    getattr(model.get_layer("s"), argument).calibrated.assign(0.0)
    with pytest.raises(ValueError, match="s is not calibrated"):
        integer_graph(model)


def test_kernels_of_layers_put_in_by_hand_get_their_scales():
    model = by_hand()
    layer = model.get_layer("s")
    calibrate(model, images())
    kernel = ops.convert_to_numpy(layer.depthwise_kernel)
    made = ops.convert_to_numpy(layer.depthwise_quantizer(layer.depthwise_kernel))
    # 8 bits: half a step of a grid that covers the largest weight
    assert np.abs(made - kernel).max() <= np.abs(kernel).max() / 127
    scale = ops.convert_to_numpy(layer.depthwise_quantizer.scale).copy()
    layer.depthwise_kernel.assign(2 * kernel)
    calibrate(model, images())
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.depthwise_quantizer.scale), scale)


def test_bad_images_are_refused_before_anything_is_set():
    nan = images()
    nan[1, 2, 3, 0] = np.nan
    infinite = images()
    infinite[0] = np.inf
    cases = [
        (images(0), "No images"),
        ([], "No images"),
        (None, r"images must be an array \(n, ...\), .* Got None \(NoneType\)"),
        ("images/", r"images must be an array .* Got 'images/' \(str\)"),
        (images()[..., :2], r"must have shape \(None, 6, 5, 3\).* Got \(8, 6, 5, 2\)"),
        (images()[0], r"must have shape \(None, 6, 5, 3\).* Got \(6, 5, 3\)"),
        (nan, "NaN"),
        (infinite, "NaN or infinite"),
    ]
    for data, message in cases:
        model = net()
        with pytest.raises(ValueError, match=message):
            calibrate(model, data)
        assert len(uncalibrated(model)) == len(quantizers(model)), message
        assert all(q.observer is None for q in quantizers(model).values())


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"must be one of.*Got 'mean'"):
        calibrate(net(), images(), method="mean")


def test_a_model_that_makes_nan_is_named_and_left_as_it_was():
    model = net()
    model.get_layer("conv").bias.assign([np.nan, 0, 0, 0])
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, images())
    assert all(q.observer is None for q in quantizers(model).values())
    assert len(uncalibrated(model)) == len(quantizers(model))


def test_a_given_input_range_is_kept():
    model = net(input_range=(-1, 1))
    calibrate(model, images(low=-0.25, high=0.25))
    np.testing.assert_allclose(scales(model)["image_quantize"], 2 / 255, rtol=1e-6)  # float32


def test_a_model_without_quantizers_is_no_silent_success():
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3)(inputs), name="plain")
    with pytest.raises(ValueError, match=r"plain has no quantizer\. Pass what quantize_model"):
        calibrate(model, images())
    for arguments in ({"batch_size": -1}, {"batch_size": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match=r"calibrate: \w+ must be a whole number"):
            calibrate(net(), images(), **arguments)


def test_values_that_are_not_finite_are_placed():
    model = net()
    model.get_layer("conv").bias.assign(np.float32([np.nan] * 4))
    with pytest.raises(ValueError, match=r"Values at relu_quantize/.* are not finite"):
        calibrate(model, images())


def fading_net():
    """Nine convolutions of kernels near 0.1 with batch norms that have never seen data."""
    x = inputs = keras.Input((6, 5, 3))
    for i in range(9):
        small = keras.initializers.RandomUniform(-0.02, 0.02, seed=i)
        x = keras.layers.Conv2D(3, 1, use_bias=False, kernel_initializer=small, name=f"conv{i}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{i}")(x)
    return keras.Model(inputs, x)


def test_values_that_fade_away_are_told_of_with_the_way_out():
    """Each convolution keeps a few hundredths of its input."""
    model = fading_net()
    said = r"values at .* are at most .* train the float model first, or run .*reestimate_batchnorm"
    with pytest.warns(UserWarning, match=said):
        calibrate(quantize_model(model, "w8a8"), images())
    # Any warning fails a test here.
    calibrate(quantize_model(reestimate_batchnorm(model, images()), "w8a8"), images())


def test_zeros_have_no_end_to_reach():
    """A dead layer is no faded one."""
    x = inputs = keras.Input((6, 5, 3))
    x = keras.layers.Conv2D(3, 1, kernel_initializer="zeros", name="dead")(x)
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1, name="behind")(x))
    model = calibrate(quantize_model(model, "w8a8"), images())  # any warning fails a test here
    # Any scale fits zeros: that of 1.0 as the last of the codes -128..127.
    assert scales(model)["dead_quantize"] == np.float32(1 / 127)


def untrained():
    """Digits to classes by two batch norms that never saw data."""
    inputs = keras.Input((8, 8, 1))
    x = inputs
    for i in range(2):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(name=f"norm{i}")(x)
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x), name="untrained")


class TestUntrainedBatchNorms:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1)).astype("float32")

    def test_few_bits_in_front_of_training_are_warned_of_with_the_way_out(self):
        model = untrained()
        said = r"norms of untrained.* never saw data \(\['norm0', 'norm1'\]: .*reestimate_batchnorm"
        with pytest.warns(UserWarning, match=said):
            calibrate(quantize_model(model, "w4a4"), self.images)
        reestimate_batchnorm(model, self.images)
        with warnings.catch_warnings(action="error", category=UserWarning):
            calibrate(quantize_model(model, "w4a4"), self.images)

    def test_eight_bits_are_not(self):
        with warnings.catch_warnings(action="error", category=UserWarning):
            calibrate(quantize_model(untrained(), "w8a8"), self.images)

    def test_norms_whose_gain_or_mean_moved_are_trained(self):
        model = untrained()
        model.get_layer("norm0").gamma.assign(np.full(8, 2.0))
        model.get_layer("norm1").moving_mean.assign(np.full(8, 0.1))
        assert never_trained(walk.flatten(model)) == []
