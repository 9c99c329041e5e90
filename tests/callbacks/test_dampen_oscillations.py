"""The dampening penalty on a model, and its ramp."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import DampenOscillations, attach_cosine, attach_dampening
from keras_lowbit.callbacks.schedules import half_cosine
from keras_lowbit.regularizers import Dampening
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import quantize_model
from tests.callbacks import tiny


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def penalty_of(layer):
    """`sum (q - clip(w))^2` in NumPy, from the definition."""
    quantizer = layer.kernel_quantizer
    codes, scale = (numpy(v) for v in quantizer.encode(layer.kernel))
    lo, hi = quantizer.static_bounds()
    return float(
        ((codes * scale - np.clip(numpy(layer.kernel), lo * scale, hi * scale)) ** 2).sum()
    )


def test_compiled_steps_feel_the_penalty_and_its_ramp():
    """Three epochs: lambda 0, half and all of 400. Weights do not move, so the loss tells."""
    model = tiny.model()
    model.optimizer.learning_rate.assign(0.0)
    layer, x = model.get_layer("middle"), tiny.images()
    found = model.fit(
        *(a[:8] for a in x),
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[DampenOscillations(400.0)],
    ).history["loss"]
    wanted = 400 * penalty_of(layer)
    assert wanted > 0.05
    # The batch norms' moving statistics play no part in a training step.
    np.testing.assert_allclose(np.diff(found), [wanted / 2] * 2, rtol=1e-3)


def test_weights_settle_in_the_middle_of_their_bins():
    left = {}
    for strength in (0.0, 10.0):
        keras.utils.set_random_seed(0)  # one start for both: some have larger bins than others
        model = tiny.model()
        model.optimizer.learning_rate.assign(1e-3)
        tiny.train(model, [DampenOscillations(strength)], epochs=12)
        left[strength] = penalty_of(model.get_layer("middle"))
    assert left[10.0] < 0.5 * left[0.0]


def test_files_are_those_of_a_model_without(tmp_path):
    model = tiny.model(compiled=False)
    plain = [w.path for w in model.weights]
    (penalty,) = attach_dampening(model, 0.25).values()
    assert isinstance(penalty, Dampening)
    assert len(model.weights) == len(plain) + 1
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert len(again.weights) == len(plain)
    assert again.get_layer("middle").kernel.regularizer is None
    model.load_weights(tmp_path / "m.keras")
    assert float(numpy(penalty.strength)) == 0.25


def test_a_second_call_changes_the_strength():
    model = tiny.model()
    (penalty,) = attach_dampening(model, 0.5).values()
    (again,) = attach_dampening(model, 0.25).values()
    assert again is penalty
    assert float(numpy(penalty.strength)) == 0.25


@pytest.mark.once
class TestWhatIsRefused:
    def test_a_model_without_kernels_of_few_bits(self):
        with pytest.raises(ValueError, match="has no kernel of 4 bits or less to dampen"):
            attach_dampening(tiny.model("w8a8", compiled=False))
        assert list(attach_dampening(tiny.model("w6a6", compiled=False), max_bits=6)) == ["middle"]

    def test_another_penalty_on_the_kernel(self):
        ternary = Scheme(activation_bits=8, kernel="ternary")
        model = quantize_model(tiny.float_model(), ternary)
        attach_cosine(model)
        with pytest.raises(ValueError, match=r"middle: its kernel has the regularizer .*Cosine"):
            attach_dampening(model)

    def test_numbers_out_of_range(self):
        with pytest.raises(ValueError, match=r"strength must be .* at least 0\. Got -1"):
            DampenOscillations(-1)
        with pytest.raises(ValueError, match="max_bits must be a whole number of at least 1"):
            DampenOscillations(max_bits=0)
        with pytest.raises(ValueError, match=r"strength must be .* at least 0\. Got -1"):
            attach_dampening(tiny.model(compiled=False), -1)


@pytest.mark.once
def test_the_ramp_has_no_corners_and_a_single_epoch_gets_all():
    found = [half_cosine(share) for share in (-1, 0, 1 / 3, 0.5, 1, 2)]
    np.testing.assert_allclose(found, [0, 0, 0.25, 0.5, 1, 1])
    assert DampenOscillations(0.1).strength_at(0, 1) == 0.1
