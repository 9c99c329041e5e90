"""The two phases of ternary training, on a model of three layers of which one is ternary."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import TernaryPhases, attach_cosine
from keras_lowbit.regularizers import CosineTernaryRegularizer
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import calibrate, freeze, quantize_model
from tests.callbacks import tiny


def model(**options):
    scheme = Scheme(activation_bits=8, kernel="ternary", kernel_options=options)
    quantized = calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])
    tiny.compile_(quantized)
    return quantized


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


class Watch(keras.callbacks.Callback):
    """What holds while each epoch trains, and the gap of its loss to the cross-entropy."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            quantizer = self.model.get_layer("middle").kernel_quantizer
            pull, heat = float(numpy(quantizer.pull)), float(numpy(quantizer.temperature))
            self.seen.append((quantizer.enabled, round(pull, 6), round(heat, 6)))


def test_the_phases_follow_the_epochs():
    """lambda: (1 - cos(pi / 2)) / 2 and (1 - cos(pi)) / 2 of 2, then 0.1 of 2; tau 1 to 0.25."""
    watch = Watch()
    phases = TernaryPhases(2, tiny.images()[0], strength=2.0)
    history = tiny.train(model(), [phases, watch], epochs=5)
    assert watch.seen == [
        (False, 1.0, 1.0),
        (False, 2.0, 1.0),
        (True, 0.2, 1.0),
        (True, 0.2, 0.625),
        (True, 0.2, 0.25),
    ]
    logged = history.history
    assert len(logged["ternary_cosine"]) == 5
    np.testing.assert_allclose(logged["ternary_cosine"], logged["ternary_cosine/middle"])
    assert all(0.5 < value <= 1 for value in logged["ternary_cosine"])


def test_compiled_steps_feel_the_pull_and_the_switch():
    """One compiled step: the loss is cross-entropy + lambda R, of float and of ternary kernels."""
    quantized = model()
    x, y = tiny.images()
    phases = TernaryPhases(1, strength=3.0)

    class Losses(keras.callbacks.Callback):
        """Steps without an optimizer's move, so that the loss can be computed again."""

        def on_epoch_begin(self, epoch, logs=None):
            self.wanted = getattr(self, "wanted", [])
            penalty = 1 - phases.cosines()["middle"]
            logits = self.model(x[:8], training=True)
            entropy = ops.mean(
                keras.losses.sparse_categorical_crossentropy(y[:8], logits, from_logits=True)
            )
            self.wanted.append(float(numpy(entropy)) + phases.strength_at(epoch) * penalty)

    quantized.optimizer.learning_rate.assign(0.0)
    losses = Losses()
    history = quantized.fit(
        x[:8], y[:8], batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[phases, losses]
    )
    assert abs(losses.wanted[0] - losses.wanted[1]) > 0.01
    # Float32 in graphs of its own.
    np.testing.assert_allclose(history.history["loss"], losses.wanted, rtol=1e-4)


def test_the_pull_raises_the_cosine_and_nothing_pulls_without_it():
    reached = {}
    for strength in (0.0, 30.0):
        quantized = model()
        quantized.optimizer.learning_rate.assign(3e-3)
        history = tiny.train(quantized, [TernaryPhases(5, strength=strength)], epochs=6)
        reached[strength] = history.history["ternary_cosine"]
    assert reached[30.0][4] > reached[0.0][4] + 0.02
    assert reached[30.0][4] > reached[30.0][0]


def test_the_pull_ends_with_its_fit_and_comes_back_with_the_next():
    quantized, phases, watch = model(), TernaryPhases(1, strength=2.0), Watch()
    tiny.train(quantized, [phases, watch], epochs=2)
    tiny.train(quantized, [watch], epochs=1)
    tiny.train(quantized, [phases, watch], epochs=4, initial_epoch=2)
    assert [pull for _, pull, _ in watch.seen] == [2.0, 0.2, 0.0, 0.2, 0.2]


def test_the_loss_of_a_later_fit_is_that_of_a_model_without_a_pull():
    quantized = model()
    quantized.optimizer.learning_rate.assign(0.0)
    x, y = tiny.images(8)
    tiny.train(quantized, [TernaryPhases(0, strength=30.0, keep=1.0)], epochs=1, n=8)
    loss = tiny.train(quantized, [], epochs=1, n=8).history["loss"]
    entropy = keras.losses.sparse_categorical_crossentropy(
        y, quantized(x, training=True), from_logits=True
    )
    # float32 noise of sums in another order
    np.testing.assert_allclose(loss, numpy(ops.mean(entropy)), rtol=1e-5)


def test_what_is_saved_or_kept_amid_training_brings_no_pull_back(tmp_path):
    quantized = model()
    file = str(tmp_path / "best.weights.h5")
    behind = [
        keras.callbacks.ModelCheckpoint(file, save_weights_only=True),
        keras.callbacks.EarlyStopping("loss", restore_best_weights=True),
    ]
    tiny.train(quantized, [TernaryPhases(0), *behind], epochs=2)
    pull = quantized.get_layer("middle").kernel_quantizer.pull
    assert float(numpy(pull)) == 0
    quantized.load_weights(file)
    assert float(numpy(pull)) == 0


def test_training_that_stops_early_or_is_interrupted_ends_the_pull_too():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    quantized, phases = model(), TernaryPhases(0)
    pull = quantized.get_layer("middle").kernel_quantizer.pull
    tiny.train(quantized, [phases, Stop()], epochs=3)
    assert float(numpy(pull)) == 0
    with pytest.raises(KeyboardInterrupt):
        tiny.train(quantized, [phases, Interrupt()], epochs=3)
    phases.on_train_end()
    assert float(numpy(pull)) == 0


def test_batch_norms_are_new_at_the_switch():
    quantized, x = model(), tiny.images()[0]
    norm = quantized.get_layer("bn2")
    norm.moving_mean.assign(np.full(4, 100.0))
    phases = TernaryPhases(0, x)
    phases.set_params({"epochs": 1})
    phases.set_model(quantized)
    phases.on_train_begin()
    phases.on_epoch_begin(0)
    assert np.abs(numpy(norm.moving_mean)).max() < 10


def test_the_penalty_is_that_of_the_quantizers_own_projection():
    quantized = model(threshold="quantile", zeros=0.9)
    penalty = attach_cosine(quantized, 0.5)["middle"]
    kernel = numpy(quantized.get_layer("middle").kernel)
    codes, _ = quantized.get_layer("middle").kernel_quantizer.encode(kernel)
    codes = numpy(codes)
    cosine = (kernel * codes).sum((0, 1, 2)) / np.sqrt(
        (kernel**2).sum((0, 1, 2)) * (codes**2).sum((0, 1, 2))
    )
    # Float32, taken off 1.
    np.testing.assert_allclose(numpy(penalty(kernel)), 0.5 * np.mean(1 - cosine), rtol=1e-4)
    assert attach_cosine(quantized, 0.25)["middle"] is penalty
    # As above.
    np.testing.assert_allclose(numpy(penalty(kernel)), 0.25 * np.mean(1 - cosine), rtol=1e-4)


def test_a_ternary_model_survives_files_and_freezing(tmp_path):
    quantized = model(gradient="sigmoid")
    tiny.train(quantized, [TernaryPhases(1, tiny.images()[0])], epochs=2)
    quantized.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    kernels = [m.get_layer("middle").kernel_quantizer for m in (quantized, again)]
    assert [float(numpy(q.pull)) for q in kernels] == [0.0] * 2
    assert [float(numpy(q.temperature)) for q in kernels] == [0.25] * 2
    x = tiny.images()[0]
    np.testing.assert_array_equal(*(m.predict(x, verbose=0) for m in (quantized, again)))
    first, second = (numpy(freeze(m)(x)) for m in (quantized, again))
    np.testing.assert_array_equal(first, second)


def test_phase_p_alone_is_no_export():
    quantized = model()
    phases = TernaryPhases(1)
    phases.set_model(quantized)
    phases.set_params({"epochs": 2})
    phases.on_epoch_begin(0)
    with pytest.raises(ValueError, match="quantization is switched off"):
        freeze(quantized)


@pytest.mark.once
class TestArguments:
    def test_a_switch_past_the_end_is_refused(self):
        with pytest.raises(ValueError, match=r"begins at epoch 2, which never comes: .* 0 to 1"):
            tiny.train(model(), [TernaryPhases(2)], epochs=2)

    def test_a_model_without_ternary_kernels_is_refused(self):
        with pytest.raises(ValueError, match=r"tiny_quantized has no ternary kernel"):
            tiny.train(tiny.model("w4a4"), [TernaryPhases(1)], epochs=2)

    def test_another_penalty_on_the_kernel_is_no_silent_loss(self):
        quantized = model()
        quantized.get_layer("middle").kernel.regularizer = keras.regularizers.L2(1e-4)
        with pytest.raises(ValueError, match=r"middle: its kernel has the regularizer .*L2"):
            attach_cosine(quantized)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"switch_epoch": -1}, "switch_epoch must be a whole number of at least 0"),
            ({"switch_epoch": 1, "strength": -1}, "strength must be a finite number, at least 0"),
            ({"switch_epoch": 1, "temperature": (1.0, 0.0)}, "temperature is the first and the"),
            ({"switch_epoch": 1, "batch_size": 0}, "batch_size must be a whole number"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TernaryPhases(**arguments)


def test_half_a_cosine_of_three_epochs():
    phases = TernaryPhases(3, strength=1.0)
    wanted = [(1 - math.cos(math.pi * k / 3)) / 2 for k in (1, 2, 3)]
    np.testing.assert_allclose([phases.strength_at(e) for e in range(3)], wanted)
    assert phases.strength_at(7) == pytest.approx(0.1)
    assert isinstance(attach_cosine(model())["middle"], CosineTernaryRegularizer)
