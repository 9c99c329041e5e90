"""The temperature of soft choices falls by the epoch, and compiled steps feel it."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import TemperatureAnnealing
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import calibrate, quantize_model
from tests.callbacks import tiny

SELECTOR = Scheme(2, 8, kernel="levels", kernel_options={"mode": "selector"})
SIGMOID = Scheme(activation_bits=8, kernel="ternary", kernel_options={"gradient": "sigmoid"})


def model(scheme):
    keras.utils.set_random_seed(4)
    quantized = calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])
    tiny.compile_(quantized)
    return quantized


def temperature(quantized):
    return float(ops.convert_to_numpy(quantized.get_layer("middle").kernel_quantizer.temperature))


@pytest.mark.parametrize("scheme", [SELECTOR, SIGMOID], ids=["selector", "sigmoid"])
def test_temperature_follows_the_epoch(backend, scheme):
    """A half cosine from 1 to 0.25 over three epochs: 1, 0.625, 0.25."""
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(temperature(watch.model))
    )
    tiny.train(model(scheme), [TemperatureAnnealing(), watch], epochs=3)
    # The variable is float32, and the cosine of a right angle is not quite 0.
    np.testing.assert_allclose(seen, [1.0, 0.625, 0.25], rtol=1e-6)


def test_compiled_steps_feel_the_temperature(backend):
    """Alike while both have 1; with 0.25 the softmax has another derivative."""

    def logits_by_epoch(callbacks):
        quantized, kept = model(SELECTOR), []
        logits = quantized.get_layer("middle").kernel_quantizer.logits
        keep = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: kept.append(ops.convert_to_numpy(logits).copy())
        )
        tiny.train(quantized, [*callbacks, keep], epochs=2)
        return kept

    plain, cooled = logits_by_epoch([]), logits_by_epoch([TemperatureAnnealing(1.0, 0.25)])
    np.testing.assert_array_equal(plain[0], cooled[0])
    assert np.abs(plain[1] - cooled[1]).max() > 1e-6
    assert np.isfinite(cooled[1]).all()


@pytest.mark.once
def test_one_epoch_has_the_last_temperature():
    assert TemperatureAnnealing(1.0, 0.5).at(0, 1) == 0.5


@pytest.mark.parametrize("given", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_temperatures_must_be_positive(given):
    with pytest.raises(
        ValueError,
        match=r"TemperatureAnnealing: (first|last) must be .* above 0\. Got",
    ):
        TemperatureAnnealing(*given)


@pytest.mark.parametrize("scheme", ["w4a4", "wta8"])
def test_a_model_without_temperatures_is_refused(scheme):
    with pytest.raises(ValueError, match="no quantizer of tiny_quantized has a gradient with a"):
        tiny.train(model(scheme), [TemperatureAnnealing()], epochs=1)
