"""Stochastic precision: the specification of methods that arXiv:1908.04680 only names."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import StochasticPrecision, TwoStage
from keras_lowbit.callbacks.stochastic_precision import units_of
from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny


class Watch(keras.callbacks.Callback):
    """m of each unit after the step's beginning, and during validation."""

    def __init__(self, units):
        super().__init__()
        self.units, self.train, self.test = units, {}, []

    def state(self):
        states = [{q.enabled for q in unit} for unit in self.units]
        assert all(len(s) == 1 for s in states)
        return [s.pop() for s in states]

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.test.append(self.state())

    def on_train_batch_end(self, batch, logs=None):
        _ = self.model  # On JAX variables hold their values only after this.
        self.train[self.epoch, batch] = self.state()

    def on_test_batch_end(self, batch, logs=None):
        _ = self.model
        self.test.append(self.state())


def residual():
    """Stem, two blocks (the second with a shortcut of its own), head: two additions."""
    inputs = keras.Input((5, 5, 2))
    x = start = keras.layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="one_a")(x)
    x = keras.layers.Conv2D(4, 3, padding="same", name="one_b")(x)
    x = start = keras.layers.Add(name="one_add")([x, start])
    x = keras.layers.Conv2D(6, 3, padding="same", activation="relu", name="two_a")(x)
    x = keras.layers.Conv2D(6, 3, padding="same", name="two_b")(x)
    x = keras.layers.Add(name="two_add")([x, keras.layers.Conv2D(6, 1, name="two_cut")(start)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    return quantize_model(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)), "w2a2")


def kernels(model, units):
    named = {id(s.quantizer): s.layer_name for s in sites_of(model)}
    return [{named[id(q)] for q in unit if q.role == "kernel"} for unit in units]


def test_a_unit_is_what_lies_between_two_additions():
    model = residual()
    units = units_of(model)
    first = {"stem", "one_a", "one_b"}
    assert kernels(model, units) == [first, {"two_a", "two_b", "two_cut"}, {"head"}]
    flat = [id(q) for unit in units for q in unit]
    assert sorted(flat) == sorted(id(s.quantizer) for s in sites_of(model))


@pytest.mark.parametrize(("make", "unit"), [(tiny.model, "block"), (residual, "layer")])
def test_a_unit_of_a_plain_net_is_a_layer(make, unit):
    model = make()
    found = [names for names in kernels(model, units_of(model, unit)) if names]
    assert all(len(names) == 1 for names in found)
    assert len(found) == (3 if make is tiny.model else 7)


def test_units_of_a_wrapped_model_are_found():
    class Wrapper(keras.Model):
        def __init__(self, *inner):
            super().__init__()
            self.inner = list(inner)

    model = residual()
    ids = [[id(q) for q in unit] for unit in units_of(model)]
    assert [[id(q) for q in unit] for unit in units_of(Wrapper(model))] == ids


def test_the_probability_rises_linearly_over_the_ramp():
    callback = StochasticPrecision(0.5, 1.0, 0.6)
    got = [callback.probability(t) for t in (0.0, 0.3, 0.6, 0.9)]
    np.testing.assert_allclose(got, [0.5, 0.75, 1.0, 1.0], rtol=1e-15)  # float64


def test_draws_follow_the_probability():
    """1000 units at p = 0.25: 250 expected, standard deviation 13.7."""
    callback = StochasticPrecision(0.25, 0.25)
    callback.set_params({"steps": 3, "epochs": 2})
    callback.units = [[]] * 1000
    drawn = callback.draw(0, 1)
    assert 195 < drawn.sum() < 305
    np.testing.assert_array_equal(drawn, callback.draw(0, 1))
    assert (drawn != callback.draw(0, 2)).any()
    assert (drawn != callback.draw(1, 1)).any()


def test_steps_see_the_draws_and_evaluation_does_not():
    """6 steps with ramp 0.5: p = 1 from step 3 on."""
    model = tiny.model("w2a2")
    callback = StochasticPrecision(0.0, 1.0, 0.5)
    watch = Watch(units_of(model))
    x, y = tiny.images(8)
    tiny.train(model, [callback, watch], epochs=2, validation_data=(x, y))
    steps = [(epoch, batch) for epoch in (0, 1) for batch in (0, 1, 2)]
    assert list(watch.train) == steps
    for step in steps:
        np.testing.assert_array_equal(watch.train[step], callback.draw(*step))
    assert not any(watch.train[0, 0])  # p = 0
    assert all(all(watch.train[1, batch]) for batch in (0, 1, 2))
    assert len(watch.test) == 4  # two epochs' beginnings, two validations
    assert all(all(state) for state in watch.test)


def test_a_compiled_step_computes_with_what_was_drawn():
    """At p = 0 the loss is the float model's, at p = 1 the quantized one's."""
    losses = []
    for p in (0.0, 1.0):
        model = tiny.model("w2a2", compiled=False)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit = keras.backend.backend() == "jax"
        model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=jit)
        history = tiny.train(model, [StochasticPrecision(p, p)], epochs=1)
        want = tiny.float_model() if p == 0 else model
        if p == 0:
            for layer in want.layers:
                if layer.weights:
                    source = model.get_layer(layer.name)
                    for variable in layer.weights:
                        variable.assign(_of(source, variable.name))
        x, y = tiny.images()
        # Mean of three batches of 8; float32 sums in another order when compiled.
        np.testing.assert_allclose(history.history["loss"][0], _value(loss(y, want(x))), rtol=1e-5)
        losses.append(history.history["loss"][0])
    assert abs(losses[0] - losses[1]) > 1e-3


def _value(tensor):
    return float(ops.convert_to_numpy(tensor))


def _of(layer, name):
    return next(np.array(v) for v in layer.weights if v.name == name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p0": -0.1}, r"p0 must be a finite number, at least 0 and at most 1\. Got -0\.1"),
        ({"p1": 1.5}, r"p1 must be a finite number, at least 0 and at most 1\. Got 1\.5"),
        ({"p0": 0.9, "p1": 0.5}, "p1 must be at least p0"),
        ({"ramp": 0}, "ramp must be above 0"),
        ({"unit": "element"}, "unit must be 'block' or 'layer'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StochasticPrecision(**arguments)


def test_models_that_do_not_fit_are_refused_before_training():
    with pytest.raises(ValueError, match="tiny has no quantizer"):
        _begin(StochasticPrecision(), tiny.float_model())
    model = tiny.model(compiled=False)
    model.compile(loss="mse", steps_per_execution=2)
    with pytest.raises(ValueError, match=r"steps_per_execution=1\. Got 2"):
        _begin(StochasticPrecision(), model)


def _begin(callback, model):
    callback.set_params({"epochs": 1})
    callback.set_model(model)
    callback.on_train_begin()


class Shares(keras.callbacks.Callback):
    """Which activations and kernels were on in each step."""

    def __init__(self, model):
        super().__init__()
        quantizers = [site.quantizer for site in sites_of(model)]
        self.roles = {
            role: [q for q in quantizers if q.role == role] for role in ("kernel", "activation")
        }
        self.seen = {"kernel": [], "activation": []}

    def on_train_batch_end(self, batch, logs=None):
        _ = self.model
        for role, found in self.roles.items():
            self.seen[role].append(any(q.enabled for q in found))


@pytest.mark.parametrize("first", [True, False])
def test_what_waits_for_the_second_stage_is_not_drawn(first):
    model = tiny.model("w2a2")
    stages, draws = TwoStage(2), StochasticPrecision(p0=0.9, p1=1.0, ramp=0.1)
    shares = Shares(model)
    tiny.train(model, [*([stages, draws] if first else [draws, stages]), shares], epochs=3)
    assert shares.seen["activation"] == [False] * 6 + [True] * 3
    assert all(shares.seen["kernel"])
    assert all(site.quantizer.enabled for site in sites_of(model))


def test_a_float_stage_stays_float():
    model = tiny.model("w2a2")
    add_switches(model, [site.quantizer for site in sites_of(model)])
    for site in sites_of(model):
        site.quantizer.set_enabled(False)
    tiny.compile_(model)
    shares = Shares(model)
    tiny.train(model, [StochasticPrecision(p0=0.5), shares], epochs=1)
    assert not any(shares.seen["kernel"] + shares.seen["activation"])


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def test_an_interrupted_fit_is_mended_by_hand():
    model, draws = tiny.model("w2a2"), StochasticPrecision(p0=0.0, p1=0.0)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, [draws, Interrupt()], epochs=1)
    assert not any(site.quantizer.enabled for site in sites_of(model))
    draws.on_train_end()
    assert all(site.quantizer.enabled for site in sites_of(model))


def test_a_fresh_callback_mends_what_an_interrupted_one_left():
    model, draws = tiny.model("w2a2"), StochasticPrecision(p0=0.0, p1=0.0)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, [draws, Interrupt()], epochs=1)
    assert not any(site.quantizer.enabled for site in sites_of(model))
    _begin(StochasticPrecision(), model)
    assert all(site.quantizer.enabled for site in sites_of(model))


def test_a_model_saved_amid_a_step_is_quantized_as_a_whole(tmp_path):
    """All units are off in each step of `p0 = p1 = 0`; others' switches stay what they are."""
    path = tmp_path / "m.keras"
    model = tiny.model("w4a4")
    add_switches(model, [site.quantizer for site in sites_of(model)])
    held_back = sites_of(model)[0].quantizer
    held_back.set_enabled(False)
    off = []

    def save(batch, logs):
        _ = watch.model  # On JAX variables hold their values only after this.
        off.append(sum(not site.quantizer.enabled for site in sites_of(model)))
        model.save(path)

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=save)
    tiny.train(model, [StochasticPrecision(p0=0.0, p1=0.0), watch], epochs=1)
    assert off[-1] == len(sites_of(model))
    loaded = keras.models.load_model(path)
    assert [s.quantizer.enabled for s in sites_of(loaded)].count(False) == 1
    assert not sites_of(loaded)[0].quantizer.enabled
