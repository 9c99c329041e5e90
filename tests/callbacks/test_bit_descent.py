import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers, quantizers
from keras_lowbit.callbacks import BitDescent
from keras_lowbit.optimizers import velocities
from keras_lowbit.quantizers import Quantizer
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny

LOW = ("middle.kernel_quantizer", "relu1_quantize.quantizer")


class Watch(keras.callbacks.Callback):
    """Bits, and the largest value that each low quantizer can represent, in each epoch."""

    def __init__(self):
        super().__init__()
        self.bits, self.reach = [], []

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.bits.append(tiny.bits(self.model))
            self.reach.append(reach(self.model))


def reach(model):
    return [
        np.array(ops.convert_to_numpy(s.quantizer.scale)) * s.quantizer.static_bounds()[1]
        for s in sites_of(model)
        if f"{s.layer_name}.{s.argument}" in LOW and s.quantizer.moves_bits
    ]


def test_bits_follow_the_plan_and_eight_bit_quantizers_stay():
    model, watch = tiny.model("w4a4"), Watch()
    before = tiny.bits(model)
    tiny.train(model, [BitDescent({1: 8, 2: 6, 3: 4}), watch], epochs=4)
    assert [{b[name] for name in LOW} for b in watch.bits] == [{4}, {8}, {6}, {4}]
    kept = [{name: b[name] for name in b if name not in LOW} for b in watch.bits]
    assert set(before) > set(LOW)
    assert all(set(b.values()) == {8} for b in kept)


def test_no_quantizer_goes_below_its_own_scheme():
    scheme = {"*": "w3a3", "middle": "w5a6"}
    model = quantize_model(tiny.float_model(), scheme)
    with pytest.raises(ValueError, match="quantized at 5 or more"):
        _begin(BitDescent({0: 8, 1: 3}), model, epochs=2)
    descent = BitDescent({0: 8, 1: 5})
    _begin(descent, model, epochs=2)
    descent.on_epoch_begin(1)
    assert tiny.bits(model)["middle.kernel_quantizer"] == 5
    assert tiny.bits(model)["relu1_quantize.quantizer"] == 6


@pytest.mark.parametrize(
    ("targets", "expected"), [("weights", (6, 4)), ("activations", (4, 6)), ("both", (6, 6))]
)
def test_targets_choose_kernels_or_activations(targets, expected):
    model = quantize_model(tiny.float_model(), "w4a4")
    descent = BitDescent({0: 6}, targets=targets)
    _begin(descent, model, epochs=1)
    descent.on_epoch_begin(0)
    assert tuple(tiny.bits(model)[name] for name in LOW) == expected


def test_a_change_keeps_the_representable_range():
    model = tiny.model("w4a4")
    descent = BitDescent({0: 8, 1: 6, 2: 4})
    _begin(descent, model, epochs=3)
    start = reach(model)
    for epoch in (0, 1, 2):
        descent.on_epoch_begin(epoch)
        for before, now in zip(start, reach(model), strict=True):
            # One float32 rounding a change.
            np.testing.assert_allclose(now, before, rtol=3 * 2.0**-23)


def test_the_same_epoch_twice_hands_over_once():
    model = tiny.model("w4a4")
    descent = BitDescent({0: 8})
    _begin(descent, model, epochs=3)
    descent.on_epoch_begin(0)
    assert descent.changed_in == 0
    weights = [np.array(w) for w in model.get_weights()]
    descent.on_epoch_begin(0)
    descent.on_epoch_begin(2)
    assert descent.changed_in == 0
    for before, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, now)


class CountedDense(keras.layers.Dense):
    """Counts how often its Python code runs: once a trace where steps are compiled."""

    runs = 0

    def call(self, inputs, training=None):
        CountedDense.runs += 1
        return super().call(inputs)


def test_a_descent_traces_the_step_once(backend):
    inputs = keras.Input((6,))
    pair = layers.Quantize(bits=2, signed=True)(inputs)
    x = layers.QuantizedDense(
        5, kernel_quantizer=quantizers.get("lsq", bits=2, axis=-1), name="low"
    )(pair)
    model = keras.Model(inputs, CountedDense(3)(x))
    tiny.compile_(model)
    # Two bits need a plan that ends there; 1-bit kernels take a branch inside the same graph.
    for site in sites_of(model):
        site.quantizer.fit_scale(np.linspace(-1, 1, 30, dtype="float32").reshape(6, 5))
    CountedDense.runs = 0
    x, y = np.ones((12, 6), "float32"), np.zeros(12, "int32")
    fit = {"batch_size": 4, "verbose": 0}
    model.fit(x, y, epochs=1, **fit)
    first = CountedDense.runs
    watch = Watch()
    plan = {0: 8, 1: 6, 2: 4, 3: 2}
    model.fit(x, y, epochs=4, callbacks=[BitDescent(plan), watch], **fit)
    assert [set(b.values()) for b in watch.bits] == [{8}, {6}, {4}, {2}]
    # PyTorch runs the layer's code in each of the 4 * 3 steps, compiled backends never again.
    again = {"torch": 12}.get(backend, 0)
    assert CountedDense.runs - first == again


@pytest.mark.skipif(
    "target_bits" not in quantizers.get("lsq").get_config(),
    reason="the width a quantizer was built for is not in its config yet",
)
def test_a_model_saved_amid_the_descent_still_knows_where_it_ends(tmp_path):
    model = quantize_model(tiny.float_model(), "w4a4")
    descent = BitDescent({0: 8})
    _begin(descent, model, epochs=1)
    descent.on_epoch_begin(0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    descent = BitDescent({0: 8, 1: 4})
    _begin(descent, again, epochs=2)
    descent.on_epoch_begin(1)
    assert {tiny.bits(again)[name] for name in LOW} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "maps epochs to bits"),
        (([(0, 8)],), "maps epochs to bits"),
        (({-1: 8},), "epoch of the plan must be a whole number of at least 0. Got -1"),
        (({0.5: 8},), "epoch of the plan"),
        (({0: 0},), "bits at epoch 0 must be a whole number of at least 1. Got 0"),
        (({0: 9},), "bits at epoch 0 must be from 1 to 8. Got 9"),
        (({0: 4.5},), "bits at epoch 0"),
        (({0: True},), "bits at epoch 0"),
        (({0: 4}, "kernels"), "targets must be one of"),
    ],
)
def test_bad_plans_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        BitDescent(*arguments)


@pytest.mark.parametrize(
    ("scheme", "plan", "message"),
    [
        ("w8a8", {0: 8, 1: 4}, "no quantizer of both below 8 bits"),
        ("w4a4", {0: 8, 1: 3}, "goes down to 3 bits, but tiny_quantized was quantized at 4"),
        ("w4a4", {0: 8, 2: 4}, "epoch 2, which never comes: fit runs epochs 0 to 1"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_training(scheme, plan, message):
    model = quantize_model(tiny.float_model(), scheme)
    with pytest.raises(ValueError, match=message):
        _begin(BitDescent(plan), model, epochs=2)


def test_quantizers_inside_a_wrapped_model_are_found():
    class Wrapper(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    inner = quantize_model(tiny.float_model(), "w4a4")
    found = sites_of(Wrapper(inner))
    assert [s.layer_name for s in found] == [
        f"{inner.name}/{s.layer_name}" for s in sites_of(inner)
    ]
    assert all(isinstance(s.quantizer, Quantizer) for s in found)


def _begin(callback, model, epochs):
    callback.set_params({"epochs": epochs})
    callback.set_model(model)
    callback.on_train_begin()


def test_kernels_of_one_width_are_passed_by_and_activations_descend():
    model, watch = tiny.model("wta4"), Watch()
    tiny.train(model, [BitDescent({0: 8, 1: 4}), watch], epochs=2)
    kernels = [bits["middle.kernel_quantizer"] for bits in watch.bits]
    activations = [bits["relu1_quantize.quantizer"] for bits in watch.bits]
    assert (kernels, activations) == ([2, 2], [8, 4])


@pytest.mark.parametrize("wrap", [lambda one: one, keras.optimizers.LossScaleOptimizer])
def test_averages_of_scales_follow_a_change_of_bits(wrap):
    """At 8 to 2 bits a scale grows by 255 / 3; with rates of nothing its average must too."""
    model = tiny.model("w2a2", compiled=False)
    model.compile(
        wrap(keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=0.9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    before = {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables}
    tiny.train(model, [BitDescent({0: 8, 1: 2})], epochs=2)  # Keras puts the averages in at the end
    after = {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables}
    for path in before:
        # float32 roundings of six averages and two hand-overs
        np.testing.assert_allclose(after[path], before[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("wrap", [lambda one: one, keras.optimizers.LossScaleOptimizer])
def test_the_velocity_of_a_scale_follows_a_change_of_bits(wrap):
    """From 2 to 8 bits a scale shrinks to 1 / 127: an old velocity would carry it through 0."""
    model = tiny.model("w2a2", compiled=False)
    model.compile(
        wrap(keras.optimizers.SGD(1e-3, momentum=0.9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    tiny.train(model, [], epochs=1)
    known = {own.path: velocity for own, velocity in velocities(model.optimizer)}
    assert len(known) == len(model.trainable_variables)
    scale, kernel = (
        model.get_layer("middle").kernel_quantizer.scale,
        model.get_layer("middle").kernel,
    )
    for variable in (scale, kernel):
        known[variable.path].assign(np.full(variable.shape, 0.25, np.float32))
    before = np.array(ops.convert_to_numpy(scale))
    descent = BitDescent({0: 8})
    descent.set_model(model)
    descent.set_params({"epochs": 1})
    descent.on_train_begin()
    descent.on_epoch_begin(0)
    ratio = np.array(ops.convert_to_numpy(scale)) / before
    assert np.all(ratio < 0.02)
    np.testing.assert_array_equal(ops.convert_to_numpy(known[scale.path]), np.float32(0.25) * ratio)
    assert np.all(ops.convert_to_numpy(known[kernel.path]) == 0.25)


def test_kernels_that_take_seven_bits_at_most_start_there():
    scheme = Scheme(4, 4, kernel="dorefa")
    model = tiny.model(scheme)
    assert tiny.bits(model)["first.kernel_quantizer"] == 8  # an end, by LSQ
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(tiny.bits(model)["middle.kernel_quantizer"])
    )
    tiny.train(model, [BitDescent({0: 8, 1: 4}), record], epochs=2)
    assert seen == [7, 4]
