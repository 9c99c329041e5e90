"""Two-stage: Zhuang et al. 2018, arXiv:1711.00205."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import TwoStage
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.freeze import freeze
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny


def on(model):
    """`{role: whether its quantizers are on}`."""
    roles = ("kernel", "activation")
    sites = sites_of(model)
    states = {r: {s.quantizer.enabled for s in sites if s.quantizer.role == r} for r in roles}
    assert all(len(s) == 1 for s in states.values())
    return tuple(states[r].pop() for r in roles)


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.on = []

    def on_epoch_begin(self, epoch, logs=None):
        self.on.append(on(self.model))


@pytest.mark.parametrize(
    ("order", "first"), [("weights_first", (True, False)), ("activations_first", (False, True))]
)
def test_the_second_stage_begins_at_its_epoch(order, first):
    model, watch = tiny.model("w2a2"), Watch()
    tiny.train(model, [TwoStage(2, order), watch], epochs=3)
    assert watch.on == [first, first, (True, True)]


@pytest.mark.parametrize("scheme", ["w2a2", {"kernel": "dorefa", "activation": "dorefa"}])
def test_activations_are_bit_identical_to_float_in_stage_1(scheme):
    """methods 2.10: every tensor behind a `Quantize` is the tensor before it."""
    if isinstance(scheme, dict):
        scheme = {**scheme, "kernel_bits": 2, "activation_bits": 2, "ends_bits": None}
    model = calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])
    begin(TwoStage(1), model, epochs=2).on_epoch_begin(0)
    borders = [layer for layer in model.layers if hasattr(layer, "quantizer")]
    outputs = [(layer.input, *layer.output) for layer in borders]
    assert len(borders) >= 4
    for reals, codes, scale in keras.Model(model.input, outputs)(tiny.images()[0]):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(t) for t in (reals, codes)))
        assert scale == 1


def test_with_kernels_off_as_well_the_model_is_the_float_one():
    float_model = tiny.float_model()
    model = calibrate(quantize_model(float_model, "w2a2"), tiny.images()[0])
    begin(TwoStage(1), model, epochs=2).on_epoch_begin(0)
    begin(TwoStage(1, "activations_first"), model, epochs=2).on_epoch_begin(0)
    x = tiny.images()[0]
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, float_model)))


def test_compiled_steps_see_the_switch_without_a_retrace(backend):
    """With learning rate 0 the loss is that of the stage: as measured eagerly."""
    model = tiny.model("w2a2", compiled=False)
    x, y = tiny.images()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    expected = []
    begin(TwoStage(1), model, epochs=2).on_epoch_begin(0)
    for state in (False, True):
        for site in sites_of(model):
            if site.quantizer.role == "activation":
                site.quantizer.set_enabled(state)
        expected.append(float(ops.convert_to_numpy(loss(y, model(x)))))
    assert abs(expected[0] - expected[1]) > 1e-3
    runs = []

    class Count(keras.layers.Layer):
        def call(self, inputs):
            runs.append(1)
            return inputs

    model = keras.Sequential([model, Count()])
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=backend == "jax")
    model.fit(x, y, batch_size=24, epochs=1, verbose=0, shuffle=False)
    before = len(runs)
    history = model.fit(
        x, y, batch_size=24, epochs=2, verbose=0, shuffle=False, callbacks=[TwoStage(1)]
    )
    # Float32 sums in another order when compiled.
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)
    assert len(runs) - before == {"torch": 2}.get(backend, 0)


def test_a_step_compiled_before_there_were_switches_is_forgotten():
    model = tiny.model("w2a2")
    tiny.train(model, [], epochs=1)
    model.predict(tiny.images()[0], verbose=0)
    watch = Watch()
    tiny.train(model, [TwoStage(1), watch], epochs=2)
    model.get_layer("relu1_quantize").quantizer.set_enabled(False)
    off = model.predict(tiny.images()[0], verbose=0)
    model.get_layer("relu1_quantize").quantizer.set_enabled(True)
    assert np.abs(off - model.predict(tiny.images()[0], verbose=0)).max() > 1e-4


def test_a_run_that_stopped_in_the_first_stage_is_not_exported():
    model = tiny.model("w2a2")
    begin(TwoStage(1), model, epochs=2).on_epoch_begin(0)
    with pytest.raises(ValueError, match="quantization is switched off"):
        freeze(model)


def test_a_resumed_run_is_in_the_stage_of_its_epoch():
    model, watch = tiny.model("w2a2"), Watch()
    tiny.train(model, [TwoStage(1), watch], epochs=3, initial_epoch=2)
    assert watch.on == [(True, True)]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"switch_epoch must be a whole number of at least 1"):
        TwoStage(0)
    with pytest.raises(ValueError, match=r"order must be one of .* Got 'weights'"):
        TwoStage(1, "weights")
    with pytest.raises(ValueError, match="epoch 3, which never comes: fit runs epochs 0 to 2"):
        begin(TwoStage(3), tiny.model(), epochs=3)
    with pytest.raises(ValueError, match="tiny has no quantizer of activations to switch"):
        begin(TwoStage(1), tiny.float_model(), epochs=3)


def begin(callback, model, epochs):
    callback.set_params({"epochs": epochs})
    callback.set_model(model)
    callback.on_train_begin()
    return callback
