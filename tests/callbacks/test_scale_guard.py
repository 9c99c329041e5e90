import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import ScaleError, ScaleGuard
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny


def kernel_scale(model):
    return model.get_layer("middle").kernel_quantizer.scale


def put(variable, value):
    array = np.array(ops.convert_to_numpy(variable))
    array.reshape(-1)[0] = value
    variable.assign(array)


@pytest.fixture(scope="module")
def shared():
    return tiny.model(compiled=False)


@pytest.fixture
def begun(shared):
    """`(model, guard)` after the first step of a `fit`; the model is healed afterwards."""
    healthy = [np.array(w) for w in shared.get_weights()]
    guard = ScaleGuard(every=2)
    guard.set_model(shared)
    guard.on_train_begin()
    guard.on_epoch_begin(0)
    guard.on_train_batch_begin(0)
    guard.on_train_batch_end(0)
    yield shared, guard
    shared.set_weights(healthy)


@pytest.mark.parametrize(
    ("pick", "value", "message"),
    [
        (kernel_scale, np.nan, "Layer middle: weight .*scale is NaN or infinite .epoch 1, step 2"),
        (kernel_scale, -0.25, "Layer middle: scale of kernel_quantizer is -0.25, not positive"),
        (kernel_scale, 0.0, "Layer middle: scale of kernel_quantizer is 0, not positive"),
        (kernel_scale, 1e-8, "Layer middle: scale of kernel_quantizer has vanished: from 0"),
        (
            lambda model: model.get_layer("relu1_quantize").quantizer.scale,
            1e-9,
            "Layer relu1_quantize: scale of quantizer has vanished",
        ),
        (
            lambda model: model.get_layer("last").kernel,
            np.inf,
            "Layer last: weight .*kernel is NaN",
        ),
    ],
)
def test_a_broken_value_stops_training_with_the_layers_name(begun, pick, value, message):
    model, guard = begun
    put(pick(model), value)
    with pytest.raises(ScaleError, match=message):
        guard.on_train_batch_end(1)


def test_a_value_broken_between_two_checks_is_seen_at_the_end_of_the_epoch(begun):
    model, guard = begun
    guard.on_train_batch_end(1)
    put(kernel_scale(model), np.nan)
    guard.on_train_batch_end(2)
    with pytest.raises(ScaleError, match="epoch 1, step 3"):
        guard.on_epoch_end(0)


def test_what_the_end_of_fit_puts_in_the_weights_is_seen(begun):
    model, guard = begun
    guard.on_epoch_end(0)
    put(kernel_scale(model), -1e-3)
    with pytest.raises(
        ScaleError, match=r"Layer middle: scale of kernel_quantizer is -0.001, not positive"
    ):
        guard.on_train_end()


class PutAtTheEnd(keras.callbacks.Callback):
    """As averages (`use_ema`) do: Keras takes them before it applies constraints."""

    def on_train_end(self, logs=None):
        put(kernel_scale(self.model), -1e-3)


def test_fit_ends_with_the_name_of_a_layer_that_its_end_broke():
    with pytest.raises(ScaleError, match=r"Layer middle: scale of kernel_quantizer is -0.001, not"):
        tiny.train(tiny.model(), [PutAtTheEnd(), ScaleGuard()], epochs=1)


def test_adams_steps_are_pointed_at_where_clipping_is_no_help():
    model = tiny.model()  # compiled with Adam
    model.optimizer.learning_rate.assign(1.0)
    with pytest.raises(ScaleError, match=r"scale .*RatedAdam\(rate, rates=quantizer_rates"):
        tiny.train(model, [ScaleGuard(every=1)], epochs=1)


class Break(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            put(kernel_scale(self.model), np.nan)


def test_fit_stops_at_the_next_check_and_says_how_far_a_nan_has_spread():
    model = tiny.model()
    with pytest.raises(ScaleError, match=r"Layer middle: .*epoch 1, step 1 of this fit"):
        tiny.train(model, [Break(), ScaleGuard(every=1)], epochs=1)
    with pytest.raises(ScaleError, match=r"Layer first \(and [2-9] more layers\): .*step 2 of"):
        tiny.train(tiny.model(), [Break(), ScaleGuard(every=2)], epochs=1)


def test_a_healthy_run_passes_and_so_does_a_channel_that_was_dead_from_the_start():
    model = tiny.float_model()
    kernel = np.array(ops.convert_to_numpy(model.get_layer("middle").kernel))
    kernel[..., 1] = 0.0
    model.get_layer("middle").kernel.assign(kernel)
    model = calibrate(quantize_model(model, "w4a4"), tiny.images()[0])
    scales = np.array(ops.convert_to_numpy(kernel_scale(model)))
    assert scales[1] == np.float32(1 / 7)  # any scale fits zeros
    tiny.compile_(model)
    tiny.train(model, [ScaleGuard(every=1)], epochs=2)


def test_activations_that_never_saw_data_are_refused_before_the_first_step():
    model = quantize_model(tiny.float_model(), "w4a4")
    tiny.compile_(model)
    with pytest.raises(ValueError, match=r"relu1_quantize.*never calibrated\. Call calibrate"):
        tiny.train(model, [ScaleGuard()], epochs=1)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 0


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="ScaleGuard: every must be a whole number of at least 1"):
        ScaleGuard(0)
