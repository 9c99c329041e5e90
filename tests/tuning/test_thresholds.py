"""`tune_thresholds`: nothing but thresholds moves, and never for the worse (arXiv:1812.07872)."""

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit.quantizers import Threshold
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import thresholds, tune_thresholds
from tests.gradients import gradient
from tests.tuning.nets import images, quantized, small

X = images()
SCHEME = Scheme(4, 4, kernel="threshold", activation="threshold", ends_bits=4)


def made(model=None, wider=1.0):
    """A calibrated model; `wider` thresholds than the data's, so that there is much to gain."""
    model = small() if model is None else model
    low = calibrate(quantize_model(model, SCHEME), X, method="minmax")
    for variable in low.variables:
        if variable.path.endswith("threshold"):
            variable.assign(wider * np.array(ops.convert_to_numpy(variable)))
    return low, model


def values(model):
    return {v.path: np.array(ops.convert_to_numpy(v)) for v in model.variables}


def changed(before, after):
    return {path for path in after if not np.array_equal(before[path], after[path])}


def distance(model, low):
    both = [ops.convert_to_numpy(m(X)).astype("float64") for m in (model, low)]
    return float(np.sqrt(((both[0] - both[1]) ** 2).sum() / len(X)))


@pytest.mark.runtime
def test_thresholds_alone_move_and_the_distance_of_logits_falls():
    low, model = made(wider=1.8)
    before = values(low)
    result = tune_thresholds(low, model, X, epochs=3, learning_rate=0.05, batch_size=8)
    moved = changed(before, values(low))
    assert {path.split("/")[-1] for path in moved} == {"alpha", "bias"}
    # Biases only to the grid that the file holds (`snap_biases`): half a unit of the new scales.
    for path in moved:
        if path.endswith("bias"):
            assert np.abs(values(low)[path] - before[path]).max() < 0.1
    assert result.after < 0.8 * result.before
    # Float32 logits, another order.
    assert result.after == pytest.approx(distance(model, low), rel=1e-5)
    assert len(result.history) == 3
    assert tflite_export.convert(low, verify=X[:4]).mismatches == 0


@pytest.mark.runtime
def test_asymmetric_thresholds_export_exactly_at_8_bits():
    options = {"symmetric": False}
    names = {"kernel": "threshold", "activation": "threshold", "per_channel": False}
    low = quantize_model(small(), Scheme(8, 8, **names, activation_options=options))
    calibrate(low, X, method="minmax")
    low.get_layer("sum_quantize").quantizer.alpha.assign(0.9)
    low.get_layer("dw_quantize").quantizer.shift.assign(0.05)
    lo, hi = low.get_layer("dw_quantize").quantizer.static_bounds()
    assert lo not in (-128, -127, 0)
    assert hi - lo == 255
    assert tflite_export.convert(low, verify=X[:4]).mismatches == 0


def test_a_rate_that_only_harms_leaves_the_model_as_it_was():
    low, model = made()
    before = values(low)
    result = tune_thresholds(low, model, X, epochs=2, learning_rate=50.0, batch_size=8)
    assert min(result.history) > result.before
    assert result.after == result.before
    assert changed(before, values(low)) == set()


def test_biases_that_undo_the_gain_leave_the_model_as_it_was(monkeypatch):
    def spoil(model):
        model.get_layer("head").bias.assign_add(np.float32(9.0))

    monkeypatch.setattr(thresholds, "snap_biases", spoil)
    low, model = made(wider=1.8)
    before = values(low)
    result = tune_thresholds(low, model, X, epochs=3, learning_rate=0.05, batch_size=8)
    assert min(result.history) < result.before
    assert result.after == result.before
    assert changed(before, values(low)) == set()


def test_pointwise_factors_move_kernels_and_biases_only():
    low, model = made()
    before = values(low)
    result = tune_thresholds(
        low,
        model,
        X,
        loss="smooth_l1",
        epochs=0,
        learning_rate=0.01,
        pointwise_epochs=2,
        batch_size=8,
    )
    after = values(low)
    assert result.after < result.before
    moved = changed(before, after)
    assert {path.split("/")[-1] for path in moved} == {"kernel", "bias"}
    for path in moved:
        if path.endswith("kernel"):
            # Six steps of Adam, each of the rate at most or little more.
            assert 1e-3 < np.abs(after[path] / before[path] - 1).max() < 0.1


def test_a_pointwise_factor_ends_at_its_range():
    """Weights 2, -2, 4 with factors 0.5, 1.1, 1.3: 0.75 and 1.25 at the ends, no gradient there."""
    latent = keras.Variable(np.float32([2, -2, 4]))
    quantizer = Threshold(8)
    quantizer.build((3,))
    factor = thresholds.PointwiseFactor("layer", latent, quantizer)
    factor.factor.assign([0.5, 1.1, 1.3])
    _, to_factor = gradient(lambda _: ops.sum(factor.kernel()), [0.0], variables=[factor.factor])
    np.testing.assert_array_equal(to_factor, [0, -2, 0])
    factor.write()
    np.testing.assert_allclose(ops.convert_to_numpy(latent), [1.5, -2.2, 5.0], rtol=1e-6)  # float32


def test_losses_by_hand():
    """Two images of distances (3, 4) and 0: sqrt(25 / 2); sums 7 and 0 but for the smoothing."""
    wanted, got = np.zeros((2, 2), "float32"), np.float32([[3, -4], [0, 0]])
    wanted, got = map(ops.convert_to_tensor, (wanted, got))
    # Float32.
    np.testing.assert_allclose(float(thresholds.rmse(wanted, got)), np.sqrt(12.5), rtol=1e-6)
    want = (np.sqrt(9 + 1e-5) + np.sqrt(16 + 1e-5) + 2 * np.sqrt(1e-5)) / 2
    np.testing.assert_allclose(float(thresholds.smooth_l1(wanted, got)), want, rtol=1e-6)  # float32


@pytest.mark.once
class TestRefusals:
    def test_a_model_without_thresholds(self):
        model = small()
        with pytest.raises(ValueError, match="has no Threshold quantizer"):
            tune_thresholds(quantized(model), model, X)

    def test_batch_norms(self):
        low, model = made(model=small(norms=True))
        with pytest.raises(ValueError, match=r"batch norms \(\['stem_bn', 'dw_bn'\]\)"):
            tune_thresholds(low, model, X)

    def test_a_quantizer_that_is_off(self):
        low, model = made()
        quantizer = low.get_layer("stem").kernel_quantizer
        quantizer.add_switch()
        quantizer.set_enabled(False)
        with pytest.raises(ValueError, match=r"tune_thresholds: at \['stem.kernel.*switched off"):
            tune_thresholds(low, model, X)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"loss": "mse"}, "loss must be one of"),
            ({"epochs": -1}, "epochs must be a whole number"),
            ({"epochs": 0}, "both 0"),
        ],
    )
    def test_arguments_out_of_range(self, options, match):
        low, model = made()
        with pytest.raises(ValueError, match=match):
            tune_thresholds(low, model, X, **options)
