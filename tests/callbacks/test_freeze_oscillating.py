"""Iterative weight freezing (Nagel et al. 2022, arXiv:2203.11086), by numbers worked by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import BitDescent, FreezeOscillating, Resume
from keras_lowbit.layers import QuantizedDense
from keras_lowbit.quantizers import LSQ, DoReFa
from tests.callbacks import tiny


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def dense(quantizer=None, scale=0.5):
    """Three weights in a kernel of 4 bits."""
    layer = QuantizedDense(1, kernel_quantizer=quantizer or LSQ(4), use_bias=False, name="dense")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    if quantizer is None:
        layer.kernel_quantizer.scale.assign(scale)
    return model


class Hand:
    """A callback whose steps are latent weights written by hand."""

    def __init__(self, callback, model, first, epochs=1, steps=4):
        self.callback, self.latent, self.batch = callback, model.layers[-1].kernel, 0
        self.latent.assign(np.reshape(np.float32(first), (3, 1)))
        callback.set_params({"epochs": epochs, "steps": steps})
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)

    def step(self, latents):
        """What the latent weights are when the callback had its turn."""
        self.latent.assign(np.reshape(np.float32(latents), (3, 1)))
        self.callback.on_train_batch_end(self.batch)
        self.batch += 1
        return numpy(self.latent).reshape(-1).tolist()


def test_the_moving_averages_by_hand():
    """Scale 0.5, momentum 1/2, threshold 0.7. Codes from 0, of three weights:

    0 1 0 1 hops in the steps 2 and 3: f = 0, 1/2, 3/4; m = 1/2, 1/4, 5/8: frozen at 1
    0 1 2 3 goes one way: f = 0
    0 1 1 0 hops once, in step 3: f = 1/2; a step without a change keeps the direction
    """
    callback = FreezeOscillating((0.7, 0.7), momentum=0.5)
    hand = Hand(callback, dense(), [0.1, 0, 0])
    assert hand.step([0.3, 0.5, 0.4]) == pytest.approx([0.3, 0.5, 0.4])
    assert hand.step([0.2, 1.0, 0.4]) == pytest.approx([0.2, 1.0, 0.4])
    assert hand.step([0.3, 1.5, 0.2]) == pytest.approx([0.5, 1.5, 0.2])
    state = callback.get_state()
    np.testing.assert_array_equal(state["dense:frequency"].reshape(-1), [0.75, 0, 0.5])
    np.testing.assert_array_equal(state["dense:mean"].reshape(-1)[:2], [0.625, 2.125])
    np.testing.assert_array_equal(state["dense:codes"].reshape(-1), [1, 3, 0])
    # It stays, wherever the optimizer moves it, and moves with the scale.
    assert hand.step([-3.0, 1.5, 0.2])[0] == 0.5
    callback.model.layers[-1].kernel_quantizer.scale.assign(0.25)
    assert hand.step([0.5, 0.75, 0.1])[0] == 0.25
    # Also when it has been calm for long: f = 0.12 after three steps, and 0.56 after the fourth.
    for latent in (0.25, 0.25, 0.25, -3.0):
        assert hand.step([latent, 0.75, 0.1])[0] == 0.25
    assert callback.get_state()["dense:frequency"][0] < 0.7
    assert callback.shares() == {"dense": pytest.approx(1 / 3)}
    logs = {}
    callback.on_epoch_end(0, logs)
    assert logs == {"frozen_weights": pytest.approx(1 / 3)}


def test_a_weight_is_frozen_at_its_mean_and_not_where_it_is():
    """Momentum 1/4: the first hop gives f = 1/4 and freezes. From 0, of two weights:

    1 1 1 0 has m = .25, .4375, .578, .434: frozen at 0
    1 1 1 1 0 has m = .684 after the fourth step, then .513: frozen at 1, though its code is 0
    """
    callback = FreezeOscillating((0.2, 0.2), momentum=0.25)
    hand = Hand(callback, dense(scale=1.0), [0, 0, 0], steps=6)
    for codes in ([1, 1, 0], [1, 1, 0], [1, 1, 0]):
        hand.step(codes)
    assert hand.step([0.2, 1, 0]) == [0, 1, 0]
    assert hand.step([0.2, 0.2, 0]) == [0, 1, 0]


def test_the_threshold_falls_by_a_half_cosine_over_the_fit():
    callback = FreezeOscillating((0.1, 0.01))
    found = [callback.threshold_at(done) for done in (0.0, 1 / 3, 0.5, 1.0)]
    np.testing.assert_allclose(found, [0.1, 0.0775, 0.055, 0.01])
    # Momentum 1: f is 1 in the second step. 2 epochs of 2 steps: thresholds 1 to 0 at 1/4, 2/4 ...
    hand = Hand(FreezeOscillating((1.0, 0.5), momentum=1.0), dense(scale=1.0), [0, 0, 0], 2, 2)
    hand.step([1, 0, 0])
    assert hand.step([0.4, 0, 0])[0] == 0  # f = 1 > 0.75
    # With the last threshold at 1 nothing passes it.
    hand = Hand(FreezeOscillating((1.0, 1.0), momentum=1.0), dense(scale=1.0), [0, 0, 0], 2, 2)
    hand.step([1, 0, 0])
    assert hand.step([0.4, 0, 0])[0] == np.float32(0.4)


class Watch(keras.callbacks.Callback):
    """Latents and scales of `middle` at the beginning of each step, and what was frozen then."""

    def __init__(self, freeze):
        super().__init__()
        self.freeze, self.seen = freeze, []

    def on_train_batch_begin(self, batch, logs=None):
        layer = self.model.get_layer("middle")
        state = self.freeze.get_state()
        self.seen.append(
            (
                numpy(layer.kernel),
                numpy(layer.kernel_quantizer.scale),
                state["middle:frozen"],
                state["middle:codes"],
            )
        )


def restless(scheme="w3a8"):
    """A compiled model whose optimizer throws weights about."""
    model = tiny.model(scheme)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def test_frozen_weights_stay_through_compiled_steps_and_others_move():
    model, freeze = restless(), FreezeOscillating((0.0, 0.0))
    watch = Watch(freeze)
    history = tiny.train(model, [freeze, watch], epochs=5).history["frozen_weights"]
    frozen = np.array([f.mean() for _, _, f, _ in watch.seen])
    assert 0 < frozen[-1] < 1
    assert (np.diff(frozen) >= 0).all()
    assert history[-1] == freeze.shares()["middle"]
    for (before, _, f, codes), (after, scale, _, later) in zip(
        watch.seen, watch.seen[1:], strict=False
    ):
        np.testing.assert_array_equal(codes[f], later[f])
        np.testing.assert_array_equal(after[f], (codes * scale)[f])
        assert (before[~f] != after[~f]).any()
    # First and last layer have 8 bits.
    assert list(freeze.shares()) == ["middle"]


def test_batches_that_only_gather_gradients_count_nothing():
    """Six batches of four images, three an update: what two batches of twelve images count."""
    states = []
    for batch_size, gathered in ((4, 3), (12, None)):
        keras.utils.set_random_seed(1)
        model, freeze = restless(), FreezeOscillating((1.0, 1.0), momentum=0.5)
        model.compile(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=gathered),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=keras.backend.backend() == "jax",
        )
        # Evaluating batch norms: their statistics would be of other images.
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
        x, y = tiny.images()
        model.fit(x, y, batch_size, 3, verbose=0, shuffle=False, callbacks=[freeze])
        states.append(freeze.get_state())
    gathering, plain = states
    assert (plain["middle:mean"] != plain["middle:codes"]).any()
    for part in ("codes", "frequency", "mean"):
        # Sums of three means are the mean of twelve but for float noise, which moves no code here.
        np.testing.assert_array_equal(gathering[f"middle:{part}"], plain[f"middle:{part}"])


def test_counting_goes_on_in_the_middle_of_gathered_gradients():
    """Three batches an update, four an epoch: the batch behind a state is the second of three."""
    model, freeze = restless(), FreezeOscillating((1.0, 1.0))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model.compile(optimizer, "mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    freeze.set_model(model)
    freeze.on_train_begin()
    # `Resume` brings the optimizer back behind this, and then the counts.
    optimizer._iterations.assign(4)
    freeze.set_state({})
    assert not freeze._was_update(optimizer)
    optimizer._iterations.assign(6)
    assert freeze._was_update(optimizer)
    # A model with a step of its own may have no optimizer.
    model.optimizer = None
    freeze.on_train_begin()
    assert freeze._was_update(None)


def test_a_descent_is_followed_from_the_bits_on_that_oscillate():
    model, freeze = restless("w4a4"), FreezeOscillating((0.0, 0.0))
    logged = tiny.train(model, [BitDescent({0: 8, 1: 5, 2: 4}), freeze], epochs=5)
    found = logged.history["frozen_weights"]
    assert found[:2] == [0.0] * 2
    assert found[-1] > 0


def test_other_bits_start_afresh():
    model = dense(scale=1.0)
    callback = FreezeOscillating((0.7, 0.7), momentum=1.0)
    hand = Hand(callback, model, [0, 0, 0])
    hand.step([1, 0, 0])
    hand.step([0, 0, 0])
    assert callback.shares() == {"dense": pytest.approx(1 / 3)}
    model.layers[-1].kernel_quantizer.set_bits(3)
    callback.on_epoch_begin(1)
    assert callback.shares() == {"dense": 0.0}
    model.layers[-1].kernel_quantizer.set_bits(1)
    callback.on_epoch_begin(2)
    assert callback.shares() == {}


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, 1):
            raise KeyboardInterrupt


def test_killed_training_goes_on_with_what_was_counted(tmp_path):
    def run(*more, resumed=True):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        freeze = FreezeOscillating((0.05, 0.0))
        backup = [Resume(tmp_path, also=[freeze])] if resumed else []
        model = restless()
        tiny.train(model, [freeze, *more, *backup], epochs=4)
        return freeze.get_state(), [numpy(w) for w in model.weights]

    whole, weights = run(resumed=False)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupt())
    assert whole["middle:frozen"].any()
    state, found = run()
    assert state.keys() == whole.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, whole[name])
    for a, b in zip(found, weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"threshold": (0.1, 1.5)}, "threshold is the first and the last frequency"),
            ({"momentum": 0.0}, "momentum must be a finite number, above 0"),
            ({"max_bits": 1}, "max_bits must be a whole number of at least 2. Got 1"),
        ],
    )
    def test_numbers_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FreezeOscillating(**arguments)

    @pytest.mark.parametrize("quantizer", [LSQ(8), LSQ(1), DoReFa(4)])
    def test_a_model_without_bins_of_few_bits(self, quantizer):
        with pytest.raises(ValueError, match="has no kernel of 2 to 4 bits"):
            Hand(FreezeOscillating(), dense(quantizer), [0, 0, 0])

    def test_steps_that_pass_unseen(self):
        model = dense()
        model.compile(steps_per_execution=2)
        with pytest.raises(ValueError, match=r"steps_per_execution=1\. Got 2"):
            Hand(FreezeOscillating(), model, [0, 0, 0])

    def test_a_backup_that_knows_nothing_of_it(self, tmp_path):
        with pytest.raises(ValueError, match=r"BitDescent has no get_state\(\)"):
            Resume(tmp_path, also=[BitDescent({0: 4})])
        tiny.train(restless(), [Resume(tmp_path, keep=True)], epochs=1)
        freeze = FreezeOscillating()
        with pytest.raises(ValueError, match="holds no state of FreezeOscillating"):
            tiny.train(restless(), [freeze, Resume(tmp_path, also=[freeze])], epochs=2)
