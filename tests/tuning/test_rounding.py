"""Rounding to data: by hand, against every choice of codes, on the inputs that layers read."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit.layers import QuantizedConv2D, QuantizedDense, QuantizedDepthwiseConv2D
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import blocks, programs, reconstruct, rounding, streams
from tests.tuning.nets import images, mobile, quantized

X = images()


def error(target, square, codes, scale):
    left = target - codes * scale
    return left @ square @ left


@pytest.mark.once
class TestNearestOutputs:
    def test_two_inputs_that_move_together_by_hand(self):
        """Both inputs alike, weights 0.4 and 0.4: their sum is 0.8, so one code is 1, not none."""
        square = np.array([[[1.01, 1.0], [1.0, 1.01]]])
        codes, scales = rounding.nearest_outputs(
            np.full((1, 2, 1), 0.4), square, np.ones((1, 1)), -1, 1
        )
        assert sorted(codes.flatten()) == [0, 1]
        # Of the scales tried, 0.75 .. 1.2, that nearest to 0.8 for the pair: (0.8 - s)^2.
        assert scales.item() == pytest.approx(0.85, abs=0.11)

    @pytest.mark.parametrize("seed", range(5))
    def test_no_filter_ends_worse_than_nearest_codes_and_most_end_best(self, seed):
        random = np.random.default_rng(seed)
        inputs = random.normal(size=(40, 4)) @ random.normal(size=(4, 4))
        square = (inputs.T @ inputs / 40)[None]
        target, scales = random.normal(size=(1, 4, 6)), np.full((1, 6), 0.7)
        codes, chosen = rounding.nearest_outputs(target, square, scales, -2, 1)
        assert codes.min() >= -2
        assert codes.max() <= 1
        np.testing.assert_array_equal(codes, np.rint(codes))
        best = 0
        for f in range(6):
            found = error(target[0, :, f], square[0], codes[0, :, f], chosen[0, f])
            nearest = np.clip(np.rint(target[0, :, f] / 0.7), -2, 1)
            assert found <= error(target[0, :, f], square[0], nearest, 0.7) + 1e-12
            every = min(
                error(target[0, :, f], square[0], np.array(c), chosen[0, f])
                for c in itertools.product(range(-2, 2), repeat=4)
            )
            best += found <= every + 1e-9
        assert best >= 3

    def test_one_scale_for_all_filters_stays_one(self):
        random = np.random.default_rng(0)
        square = np.eye(3)[None] + 0.5
        _, scales = rounding.nearest_outputs(
            random.normal(size=(1, 3, 5)), square, np.full((1, 5), 0.3), -7, 7, shared=True
        )
        assert len(set(scales.flatten())) == 1


class Everywhere:
    """Stands in for random positions: all of them, in order."""

    def __init__(self, shape):
        self.indices = [i.reshape(-1) for i in np.indices(shape)]

    def integers(self, low, high, count):
        found = self.indices.pop(0)
        assert (low, high, count) == (0, found.max() + 1, len(found))
        return found

    def permutation(self, count):
        return np.arange(count)


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizedConv2D(6, 3, padding="same", strides=2),
        lambda: QuantizedConv2D(6, (3, 2), groups=2),
        lambda: QuantizedConv2D(3, 3, padding="same", dilation_rate=2),
        lambda: QuantizedDepthwiseConv2D(3, strides=2, padding="same"),
        lambda: QuantizedDepthwiseConv2D((2, 3), depth_multiplier=2),
        lambda: QuantizedDense(5),
    ],
)
def test_patches_are_what_filters_read(make):
    layer = make()
    layer.use_bias = False
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype("float32")
    layer.build(x.shape)
    kernel = np.asarray(ops.convert_to_numpy(layer.kernel))
    plain = {
        QuantizedConv2D: keras.layers.Conv2D,
        QuantizedDepthwiseConv2D: keras.layers.DepthwiseConv2D,
        QuantizedDense: keras.layers.Dense,
    }[type(layer)]
    names = ("filters", "units", "kernel_size", "strides", "padding", "dilation_rate", "groups")
    names += ("depth_multiplier",)
    of_plain = plain.from_config(
        {k: v for k, v in layer.get_config().items() if k in names} | {"use_bias": False}
    )
    of_plain.build(x.shape)
    of_plain.kernel.assign(kernel)
    wanted = np.asarray(ops.convert_to_numpy(of_plain(x)))
    count = int(np.prod(wanted.shape[:-1]))
    (read,) = rounding._patches(layer, [x], count, Everywhere(wanted.shape[:-1]))
    got = read @ rounding._by_group(layer, kernel)  # (groups, positions, filters)
    got = got.transpose(1, 0, 2).reshape(wanted.shape)
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # float32 sums in another order


@pytest.mark.runtime
@pytest.mark.parametrize("norms", [True, False])
def test_blocks_start_nearer_and_the_file_stays_exact(norms):
    model = mobile(norms, seed=2)
    still = {"steps": 1, "batch_size": 8, "blocks": ["b2_add"], "drop": 0.0}
    nearest, data = quantized(model, "w3a8"), quantized(model, "w3a8")
    before = reconstruct(nearest, model, X, **still)
    after = reconstruct(data, model, X, rounding="data", **still)
    assert after.blocks[0].before == before.blocks[0].before
    # 0.60 with norms and less without: seven layers of random weights.
    assert after.blocks[0].after < 0.75 * before.blocks[0].after
    assert tflite_export.convert(data, verify=X[:4]).mismatches == 0


@pytest.mark.once
def test_a_block_needs_thirty_two_positions_for_each_input_of_a_filter():
    model = mobile(False)
    programs_ = programs.pair(quantized(model), model)
    block = blocks.find(*programs_, ["b2_add"])[0]
    # Its depthwise filters have 9 inputs and 5 x 4 positions an image: 288 take 15 images.
    assert rounding.is_covered(block, 15)
    assert not rounding.is_covered(block, 14)


def assert_data_starts_as_nearest():
    """Whichever start was asked for, reconstruction gives the same model."""
    model = mobile(False, seed=2)
    low, other = quantized(model), quantized(model)
    options = {"steps": 1, "batch_size": 8, "blocks": ["b2_add"]}
    reconstruct(low, model, X, rounding="data", **options)
    reconstruct(other, model, X, **options)
    for one, two in zip(low.variables, other.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(two))


def test_a_block_with_few_positions_keeps_the_nearest_codes(monkeypatch):
    monkeypatch.setattr(rounding, "COVERAGE", 54)  # 480 positions for 9 inputs are 53
    assert_data_starts_as_nearest()


def test_a_start_that_makes_a_block_worse_is_taken_back(monkeypatch):
    def spoil(block, *_):
        for variable in rounding.variables(block):
            variable.assign(np.full(variable.shape, 3.0, "float32"))

    monkeypatch.setattr(rounding, "round_block", spoil)
    assert_data_starts_as_nearest()


@pytest.mark.parametrize("where", ["round_block", "relative_error"])
def test_a_block_is_as_it_was_where_its_start_fails(where, monkeypatch):
    """A run that goes on later must find the block untouched."""
    model = mobile(False, seed=2)
    low = quantized(model)
    before = [np.array(ops.convert_to_numpy(v)) for v in low.variables]
    spoiled = []

    def spoil(block, *_):
        for variable in rounding.variables(block):
            variable.assign(np.full(variable.shape, 3.0, "float32"))
        spoiled.append(block.name)
        if where == "round_block":
            raise KeyboardInterrupt

    measure = streams.relative_error

    def stopped(*args):
        if spoiled:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(rounding, "round_block", spoil)
    monkeypatch.setattr(streams, "relative_error", stopped)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(low, model, X, rounding="data", steps=1, batch_size=8, blocks=["b2_add"])
    assert spoiled == ["b2_add"]
    for old, new in zip(before, low.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), old)


def test_a_bias_that_only_the_quantized_layer_has_keeps_the_means_of_its_outputs():
    """It holds the offset of the image's grid, -1 .. 1 in 255 steps: 0.0 lies between two codes."""
    random = np.random.default_rng(6)
    x = random.uniform(-1, 1, (200, 6)).astype("float32") + np.float32(0.3)  # 32 positions an input
    x = np.clip(x, -1, 1)
    inputs = keras.Input((6,))
    y = keras.layers.Dense(5, use_bias=False, name="stem")(inputs)
    y = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="bn")(y))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(y))
    model.get_layer("stem").kernel.assign(random.normal(size=(6, 5)))
    scheme = Scheme(3, 8, ends_bits=None)
    low = calibrate(quantize_model(model, scheme, input_range=(-1, 1)), x)
    stem = low.get_layer("stem")
    assert model.get_layer("stem").bias is None
    assert stem.bias is not None
    block = blocks.find(*programs.pair(low, model), None)[0]
    given = [streams.Given(x)]
    rounding.round_block(block, given, given, 50, 0)
    got = ops.convert_to_numpy(keras.Model(low.input, stem.output)(x))
    wanted = x @ ops.convert_to_numpy(model.get_layer("stem").kernel)
    # Float32 of sums of 6 numbers.
    np.testing.assert_allclose(got.mean(axis=0), wanted.mean(axis=0), atol=1e-5)
    still = {"steps": 1, "batch_size": 50, "drop": 0.0, "rounding": "data"}
    found = reconstruct(low, model, x, **still)
    assert np.isfinite([one.after for one in found.blocks]).all()


def test_an_unknown_rounding_is_refused():
    model = mobile(False)
    with pytest.raises(ValueError, match=r"rounding must be one of .*Did you mean 'data'"):
        reconstruct(quantized(model), model, X, rounding="date")
