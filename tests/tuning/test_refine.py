"""`refine`: latents start in the middle of their codes, and the logits come nearer."""

import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import Rates, refine, streams
from keras_lowbit.tuning.block_model import BlockModel, logit_error
from tests.tuning.nets import images, mobile, quantized, small

X = images()


def outputs(model):
    return ops.convert_to_numpy(model(X))


def weights(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables]


def test_kernels_start_in_the_middle_of_their_codes(monkeypatch):
    model = small()
    low = quantized(model)
    kernel, quantizer = low.get_layer("stem").kernel, low.get_layer("stem").kernel_quantizer
    scale = ops.convert_to_numpy(quantizer.scale)
    codes = np.round(ops.convert_to_numpy(kernel) / scale)
    near = codes + np.where(codes > 0, -0.49, 0.49)  # all near a border, none over it
    kernel.assign(near * scale)
    before, started = outputs(low), []

    def stopped(self, *args):
        for state in self.states:
            if hasattr(state, "codes_variable") and state.latent is kernel:
                started.append(np.array(ops.convert_to_numpy(state.codes_variable)))
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockModel, "train_on_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine(low, model, X)
    lo, hi = quantizer.static_bounds()
    # In codes, of at most 127: float32 of `code * scale / scale` is off by 2^-23 of each.
    np.testing.assert_allclose(started[0], np.clip(codes, lo, hi), atol=1e-5)
    np.testing.assert_array_equal(outputs(low), before)


@pytest.mark.runtime
def test_logits_come_nearer_and_the_file_stays_exact():
    model = mobile(seed=2)
    low = quantized(model, "w4a8")
    for layer in low.layers:  # kernels that are all too large
        if getattr(layer, "kernel_quantizer", None) is not None:
            scale = layer.kernel_quantizer.scale
            scale.assign(1.15 * ops.convert_to_numpy(scale))
    wanted = outputs(model)
    start = float(logit_error([wanted], [outputs(low)]))
    rates = Rates(codes_4bit=2e-3, codes_8bit=1e-2, biases=3e-3, log_scales=1e-2)
    found = refine(low, model, X, steps=40, batch_size=12, rates=rates)
    assert len(found.blocks) == 1
    assert float(logit_error([wanted], [outputs(low)])) < 0.9 * start
    assert tflite_export.convert(low, verify=X[:4]).mismatches == 0


def codes_of(model):
    found = []
    for layer in model.layers:
        if getattr(layer, "kernel_quantizer", None) is not None:
            codes, _ = layer.quantized_kernel(layer.kernel, layer.kernel_quantizer)
            found.append(np.array(ops.convert_to_numpy(codes)))
    return found


def test_scales_and_biases_move_and_codes_rest():
    model = mobile(seed=2)
    low = quantized(model, "w4a4")
    before, codes, wanted = weights(low), codes_of(low), outputs(model)
    start = float(logit_error([wanted], [outputs(low)]))
    rates = Rates(codes_4bit=0, codes_8bit=0, biases=3e-3, log_scales=1e-2)
    refine(low, model, X, steps=40, batch_size=12, rates=rates)
    assert float(logit_error([wanted], [outputs(low)])) < 0.9 * start
    for one, other in zip(codes, codes_of(low), strict=True):
        np.testing.assert_array_equal(one, other)
    changed = zip(low.variables, weights(low), before, strict=True)
    moved = {v.path for v, new, old in changed if (new != old).any()}
    for name in ("stem/kernel", "lsq/scale", "beta"):  # latent kernels follow their scales
        assert any(path.endswith(name) for path in moved), (name, moved)


def test_codes_rest_unless_rates_for_them_are_given(monkeypatch):
    seen = []

    def stopped(self, *args):
        states = [state for state in self.states if hasattr(state, "codes_variable")]
        seen.append({state.codes_variable.trainable for state in states})
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockModel, "train_on_batch", stopped)
    for rates in (None, Rates()):
        model = small()
        with pytest.raises(KeyboardInterrupt):
            refine(quantized(model), model, X, steps=1, batch_size=8, rates=rates)
    assert seen == [{False}, {True}]


@pytest.mark.once
def test_an_uncalibrated_model_is_left_as_it_was():
    model = small()
    low = quantize_model(model, "w4a4")
    before = np.array(ops.convert_to_numpy(low.get_layer("stem").kernel))
    with pytest.raises(ValueError, match=r"calibrate .* first"):
        refine(low, model, X)
    np.testing.assert_array_equal(ops.convert_to_numpy(low.get_layer("stem").kernel), before)


@pytest.mark.once
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rates": 1e-3}])
def test_a_model_stays_as_it_was_where_arguments_are_refused(wrong):
    model = small()
    low = quantized(model)
    before = np.array(ops.convert_to_numpy(low.get_layer("stem").kernel))
    with pytest.raises(ValueError, match="reconstruct: "):
        refine(low, model, X, **wrong)
    np.testing.assert_array_equal(ops.convert_to_numpy(low.get_layer("stem").kernel), before)


@pytest.mark.once
def test_a_model_stays_as_it_was_where_images_do_not_fit():
    """Images are looked at behind the plan, when kernels have moved."""
    model = small()
    low = quantized(model)
    before = weights(low)
    with pytest.raises(ValueError, match="Images must have shape"):
        refine(low, model, X[:, :4])
    for old, new in zip(before, weights(low), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_model_stays_as_it_was_where_the_loss_is_not_finite():
    model = small()
    low = quantized(model)
    before = weights(low)
    with pytest.raises(FloatingPointError, match="the loss of block"):
        refine(low, model, X, steps=5, rates=Rates(log_scales=1e3, biases=1e30))
    for old, new in zip(before, weights(low), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.once
def test_a_model_stays_as_it_was_where_something_fails_behind_the_steps(monkeypatch):
    """Trained scales would be no match for the kernels from before."""
    model = small()
    low = quantized(model)
    before = weights(low)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(streams, "relative_error", full)
    with pytest.raises(OSError, match="disk full"):
        refine(low, model, X, steps=1)
    for old, new in zip(before, weights(low), strict=True):
        np.testing.assert_array_equal(new, old)
