"""Quantizers that can be switched off: reals pass, and nothing else changes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers, quantizers
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.transform.freeze import freeze
from tests.callbacks import tiny
from tests.gradients import compiled, gradient

# 0.1 is no float32 number, so that x / scale * scale is not always x.
X = np.random.default_rng(0).normal(size=(31, 3)).astype("float32")


def lsq(switched=True, role="activation", axis=None):
    quantizer = quantizers.LSQ(2, role=role, axis=axis)
    quantizer.build(X.shape)
    quantizer.fit_scale(np.float32(0.3) * X)
    if switched:
        quantizer.add_switch()
    return quantizer


def encode(quantizer, x=X):
    return [np.array(ops.convert_to_numpy(v)) for v in quantizer.encode(ops.convert_to_tensor(x))]


@pytest.mark.parametrize(("role", "axis"), [("activation", None), ("kernel", -1)])
def test_off_gives_the_reals_bit_for_bit_and_on_the_codes(role, axis):
    want = encode(lsq(switched=False, role=role, axis=axis))
    quantizer = lsq(role=role, axis=axis)
    for on in (True, False, True):
        quantizer.set_enabled(on)
        codes, scale = encode(quantizer)
        assert quantizer.enabled == on
        assert scale.shape == want[1].shape
        np.testing.assert_array_equal(codes, want[0] if on else X)
        np.testing.assert_array_equal(scale, want[1] if on else np.ones_like(want[1]))
        np.testing.assert_array_equal(ops.convert_to_numpy(quantizer(X)), codes * scale)


def test_off_the_gradient_is_1_to_x_and_0_to_the_scale():
    """Readers multiply by the scale without gradient: d sum(x * w) / dx = w."""
    quantizer = lsq()
    quantizer.set_enabled(False)
    weights = np.arange(X.size, dtype="float32").reshape(X.shape)

    def loss(x):
        codes, scale = quantizer.encode(x)
        return ops.sum(codes * ops.stop_gradient(scale) * ops.convert_to_tensor(weights))

    to_x, to_scale = gradient(loss, X, variables=[quantizer.scale])
    np.testing.assert_array_equal(to_x, weights)
    assert to_scale == 0


def test_on_the_gradients_are_those_without_a_switch():
    got, want = (
        gradient(lambda x, q=q: ops.sum(q(x) * x), X, variables=[q.scale])
        for q in (lsq(), lsq(switched=False))
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_a_kernel_of_1_bit_can_be_off():
    quantizer = lsq(role="kernel")
    quantizer.set_bits(1)
    quantizer.set_enabled(False)
    np.testing.assert_array_equal(encode(quantizer)[0], X)


def test_pixels_of_a_shifted_grid_stay_shifted():
    """Bias absorbed `offset * sum(kernel)`, so codes stand for `x - offset` in float too."""
    quantizer = quantizers.Affine(8, scale=0.1, offset=0.5)
    quantizer.build(X.shape)
    quantizer.add_switch()
    quantizer.set_enabled(False)
    np.testing.assert_array_equal(encode(quantizer)[0], X - np.float32(0.5))


def test_a_compiled_function_follows_the_switch(backend):
    if backend == "jax":
        pytest.skip("a bare jit takes variables as constants; the callbacks' tests run fit")
    quantizer = lsq()
    run = compiled(quantizer.encode)
    want = encode(quantizer)[0]
    for on in (True, False, True):
        quantizer.set_enabled(on)
        np.testing.assert_array_equal(run(X)[0], want if on else X)


def test_without_a_switch_there_is_no_variable_and_no_way_off():
    quantizer = lsq(switched=False)
    assert [v.name for v in quantizer.variables] == ["scale", "bits", "calibrated"]
    quantizer.set_enabled(True)
    with pytest.raises(ValueError, match=r"has no switch: call add_switch\(\) before"):
        quantizer.set_enabled(False)
    with pytest.raises(ValueError, match="build the model before"):
        quantizers.LSQ(2).add_switch()
    assert quantizer.add_switch()
    assert not quantizer.add_switch()


class TestFiles:
    def model(self, off=False):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((3,))
        pair = layers.Quantize(bits=2, name="grid")(inputs)
        model = keras.Model(inputs, layers.QuantizedDense(2, name="dense")(pair))
        model.get_layer("grid").quantizer.fit_scale(X)
        model.get_layer("dense").kernel_quantizer.fit_scale(np.float32([[0.3, 0.1]]))
        if off:
            model.get_layer("grid").quantizer.add_switch()
            model.get_layer("grid").quantizer.set_enabled(False)
        return model

    def test_weights_of_either_model_load_into_the_other(self, tmp_path):
        plain, switched = self.model(), self.model(off=True)
        plain.get_layer("grid").quantizer.scale.assign(0.7)
        plain.save_weights(tmp_path / "plain.weights.h5")
        switched.load_weights(tmp_path / "plain.weights.h5")
        quantizer = switched.get_layer("grid").quantizer
        assert quantizer.scale == np.float32(0.7)
        assert not quantizer.enabled  # the place of the switch is the callback's business
        quantizer.set_enabled(True)
        quantizer.scale.assign(0.9)
        switched.save_weights(tmp_path / "switched.weights.h5")
        plain.load_weights(tmp_path / "switched.weights.h5")
        np.testing.assert_array_equal(*(ops.convert_to_numpy(m(X)) for m in (plain, switched)))

    def test_a_saved_model_is_off_if_it_was(self, tmp_path):
        model = self.model(off=True)
        model.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras")
        quantizer = again.get_layer("grid").quantizer
        assert not quantizer.enabled
        np.testing.assert_array_equal(*(ops.convert_to_numpy(m(X)) for m in (model, again)))
        assert again.get_layer("dense").kernel_quantizer.switch is None

    def test_a_switch_that_is_on_leaves_no_trace_in_the_config(self):
        quantizer = lsq()
        assert quantizer.get_config() == {**lsq(False).get_config(), "name": quantizer.name}
        quantizer.set_enabled(False)
        assert quantizer.get_config()["enabled"] is False

    def test_a_file_of_another_layer_is_refused(self):
        with pytest.raises(ValueError, match=r"has 3 variables.*Got 2 from the file"):
            lsq().load_own_variables({"0": 1.0, "1": 2.0})


@pytest.mark.parametrize("argument", ["kernel_quantizer", "quantizer"])
def test_an_export_with_a_quantizer_off_is_refused_by_name(argument):
    model = tiny.model("w4a4", compiled=False)
    name = {"kernel_quantizer": "middle", "quantizer": "relu1_quantize"}[argument]
    quantizer = getattr(model.get_layer(name), argument)
    quantizer.add_switch()
    want = integer_graph(model)
    quantizer.set_enabled(False)
    with pytest.raises(ValueError, match=rf"{name}.*quantization is switched off"):
        freeze(model)
    quantizer.set_enabled(True)
    assert repr(integer_graph(model)) == repr(want)
