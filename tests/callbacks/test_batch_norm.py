from typing import ClassVar

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import (
    BatchNormReestimation,
    BitDescent,
    FreezeBatchNorm,
    Resume,
    batch_norm,
)
from keras_lowbit.distillation import MutualDistiller
from keras_lowbit.transform.reestimate import reestimate_batchnorm
from tests.callbacks import tiny


def statistics(model):
    return np.array(ops.convert_to_numpy(model.get_layer("bn2").moving_mean))


class Record(keras.callbacks.Callback):
    """Moving statistics and trained parameters of `bn2` at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.means, self.gammas = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.means.append(statistics(self.model))
        self.gammas.append(np.array(ops.convert_to_numpy(self.model.get_layer("bn2").gamma)))


@pytest.fixture
def calls(monkeypatch):
    """Where re-estimation would run: `(epoch, step in the epoch)`, filled by `Where`."""
    made = []
    monkeypatch.setattr(batch_norm, "reestimate", lambda model, *_: made.append(dict(Where.now)))
    return made


class Where(keras.callbacks.Callback):
    now: ClassVar[dict] = {}

    def on_epoch_begin(self, epoch, logs=None):
        Where.now = {"epoch": epoch, "steps": 0, "validated": False}

    def on_train_batch_end(self, batch, logs=None):
        Where.now["steps"] += 1

    def on_test_batch_end(self, batch, logs=None):
        Where.now["validated"] = True


def dense():
    model = keras.Sequential([keras.Input(tiny.SHAPE), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3))
    tiny.compile_(model)
    return model


def at(epoch, steps):
    return {"epoch": epoch, "steps": steps, "validated": False}


def test_every_and_at_end_say_when_and_validation_comes_after(calls):
    callback = BatchNormReestimation(tiny.images()[0], every=2)
    tiny.train(dense(), [Where(), callback], epochs=5, validation_data=tiny.images())
    assert calls == [at(1, 3), at(3, 3), at(4, 3)]


@pytest.mark.parametrize("form", ["images", "images and classes", "by name"])
@pytest.mark.parametrize("steps", [None, 2])
def test_batches_of_a_generator_serve_every_time(form, steps):
    """With a rate of 0 the weights rest, so statistics after each epoch are those of one array."""
    x, y = tiny.images(24 if steps is None else 16)
    batch_of = {
        "images": lambda i: x[i : i + 8],
        "images and classes": lambda i: (x[i : i + 8], y[i : i + 8]),
        "by name": lambda i: {model.inputs[0].name: x[i : i + 8]},
    }[form]
    model, alone = tiny.model(), tiny.model(compiled=False)
    alone.set_weights(model.get_weights())
    model.optimizer.learning_rate.assign(0.0)
    record = Record()
    batches = (batch_of(i) for i in range(0, len(x), 8))
    callback = BatchNormReestimation(batches, steps, every=1)
    tiny.train(model, [callback, record], epochs=2)
    tiny.train(model, [callback, record], epochs=1)
    reestimate_batchnorm(alone, x, batch_size=8)
    assert len(record.means) == 3
    for mean in record.means:
        np.testing.assert_array_equal(mean, statistics(alone))


def test_of_a_generator_without_end_only_what_is_used_is_read():
    x, read = tiny.images()[0], []

    def endless():
        while True:
            read.append(len(read))
            yield x[:8] + len(read)

    callback = BatchNormReestimation(endless(), 2, every=1)
    tiny.train(tiny.model(), [callback], epochs=3)
    assert read == [0, 1]


def test_a_fit_of_no_steps_leaves_the_statistics(calls):
    tiny.train(dense(), [BatchNormReestimation(tiny.images()[0])], epochs=2, initial_epoch=2)
    assert calls == []


def test_at_end_runs_once_and_also_after_an_early_stop(calls):
    callback = BatchNormReestimation(tiny.images()[0])
    tiny.train(dense(), [Where(), callback], epochs=2)
    assert calls == [at(1, 3)]
    calls.clear()
    tiny.train(dense(), [Where(), callback, keras.callbacks.TerminateOnNaN(), Stop(0)], epochs=2)
    assert calls == [at(0, 3)]


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch >= self.epoch


def test_after_a_descent_statistics_are_fresh_before_the_first_step_whatever_the_order(
    calls, monkeypatch
):
    for first in (True, False):
        calls.clear()
        descent = BitDescent({0: 4})
        monkeypatch.setattr(descent, "on_train_begin", lambda logs=None: None)

        def begin(epoch, logs=None, descent=descent):
            if epoch in (0, 2):
                descent.changed_in = epoch

        monkeypatch.setattr(descent, "on_epoch_begin", begin)
        callback = BatchNormReestimation(tiny.images()[0], at_end=False, after=descent)
        order = [descent, callback] if first else [callback, descent]
        tiny.train(dense(), [Where(), *order], epochs=4)
        assert calls == [at(0, 0), at(2, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1. Got 0"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"at_end": False}, "nothing to do"),
        ({"after": {0: 4}}, "after must be a BitDescent"),
    ],
)
def test_bad_arguments_of_reestimation_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchNormReestimation(None, **arguments)


def test_frozen_statistics_stand_still_while_gamma_trains_and_the_next_fit_is_free_again():
    model, record = tiny.model(), Record()
    tiny.train(model, [FreezeBatchNorm(1), record], epochs=3)
    moved = [not np.array_equal(a, b) for a, b in zip(record.means, record.means[1:], strict=False)]
    assert moved == [False, False]
    gammas = [np.abs(a - b).max() for a, b in zip(record.gammas, record.gammas[1:], strict=False)]
    assert min(gammas) > 0
    before = statistics(model)
    tiny.train(model, [], epochs=1)
    assert not np.array_equal(before, statistics(model))


def test_a_frozen_step_normalizes_with_the_moving_statistics():
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="bn2", epsilon=0.0)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = np.array([[3.0], [5.0]], "float32")
    # Fresh statistics are mean 0 and variance 1: y = x, so the loss against zeros is
    # (9 + 25) / 2 = 17. With those of the batch, y = (-1, 1) and the loss is 1.
    free = model.fit(x, 0 * x, verbose=0, shuffle=False).history["loss"]
    model.get_layer("bn2").set_weights([np.ones(1), np.zeros(1), np.zeros(1), np.ones(1)])
    frozen = model.fit(x, 0 * x, verbose=0, shuffle=False, callbacks=[FreezeBatchNorm(0)])
    assert free == [1.0]
    assert frozen.history["loss"] == [17.0]


def test_a_file_saved_amid_the_freeze_holds_ordinary_batch_norms(tmp_path):
    model = tiny.model()
    trainable = len(model.trainable_variables)
    save = keras.callbacks.ModelCheckpoint(str(tmp_path / "m.keras"))
    tiny.train(model, [FreezeBatchNorm(0), save], epochs=1)
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.get_layer("bn2").trainable
    assert len(again.trainable_variables) == trainable == len(model.trainable_variables)


def test_batch_norms_that_were_fixed_stay_fixed():
    model = tiny.model(compiled=False)
    model.get_layer("bn1").trainable = False
    model.get_layer("bn2").gamma.trainable = False
    tiny.compile_(model)
    tiny.train(model, [FreezeBatchNorm(0)], epochs=1)
    assert not model.get_layer("bn1").trainable
    assert not model.get_layer("bn2").gamma.trainable
    assert model.get_layer("bn2").beta.trainable


def test_freezing_that_cannot_happen_is_refused():
    with pytest.raises(ValueError, match=r"at least 0\. Got -1"):
        FreezeBatchNorm(-1)
    with pytest.raises(ValueError, match="epoch 2 never comes: fit runs epochs 0 to 1"):
        tiny.train(dense(), [FreezeBatchNorm(2)], epochs=2)
    with pytest.raises(ValueError, match="no trainable batch norm"):
        tiny.train(dense(), [FreezeBatchNorm(0)], epochs=2)


def test_batch_norms_of_a_student_under_a_distiller_are_reestimated():
    x, _ = tiny.images()
    student = tiny.model(compiled=False)
    both = MutualDistiller(tiny.float_model(), [student])
    both.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    alone = tiny.model(compiled=False)
    alone.set_weights(student.get_weights())
    tiny.train(both, [BatchNormReestimation(x, batch_size=8)], epochs=1)
    reestimate_batchnorm(alone, x, batch_size=8)
    # float32 noise of sums in another order
    np.testing.assert_allclose(statistics(student), statistics(alone), rtol=1e-5, atol=1e-6)


def test_a_model_without_a_graph_is_refused_before_any_step():
    class Bare(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(3)

        def call(self, x):
            return self.inner(keras.ops.reshape(x, (-1, 70)))

    model = Bare()
    tiny.compile_(model)
    with pytest.raises(ValueError, match="no graph to read"):
        tiny.train(model, [BatchNormReestimation(tiny.images()[0])], epochs=1)


def test_averaged_weights_get_statistics_of_their_own():
    x, _ = tiny.images()
    model = tiny.model(compiled=False)
    model.compile(
        keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    tiny.train(model, [BatchNormReestimation(x, batch_size=8)], epochs=2)
    kept = statistics(model)
    reestimate_batchnorm(model, x, batch_size=8)
    np.testing.assert_array_equal(kept, statistics(model))


def test_averaged_weights_of_a_run_killed_at_its_end_get_them_when_it_goes_on(tmp_path):
    class Killed(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise KeyboardInterrupt

    def run(folder, *first):
        keras.utils.set_random_seed(2)
        model = tiny.model(compiled=False)
        model.compile(
            keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        callbacks = [*first, BatchNormReestimation(tiny.images()[0], batch_size=8)]
        tiny.train(model, [*callbacks, Resume(tmp_path / folder)], epochs=2)
        return model

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", Killed())
    again = run("killed")
    np.testing.assert_array_equal(statistics(again), statistics(whole))


def test_weights_of_an_earlier_epoch_get_statistics_of_their_own():
    x, y = tiny.images()
    model = tiny.model()
    # The first epoch is the best of all, and patience never runs out: restored at the very end.
    best = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=99)
    best.restore_best_weights = True
    model.optimizer.learning_rate.assign(0.01)
    data = {"validation_data": (x, y)}
    tiny.train(model, [best, BatchNormReestimation(x, batch_size=8)], epochs=3, **data)
    assert best.best_epoch < 2
    kept = statistics(model)
    reestimate_batchnorm(model, x, batch_size=8)
    np.testing.assert_array_equal(kept, statistics(model))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_freeze_that_was_interrupted_is_taken_off_by_hand_or_by_the_next_fit(by_hand):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise KeyboardInterrupt

    model, freeze = tiny.model(), FreezeBatchNorm(0)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, [freeze, Stop()], epochs=1)
    assert not model.get_layer("bn2").trainable
    if by_hand:
        freeze.on_train_end()
        assert model.get_layer("bn2").trainable
    tiny.train(model, [freeze], epochs=1)
    assert model.get_layer("bn2").trainable
