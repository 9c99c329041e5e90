"""`AdamResetCosine`: its rates by hand, and its resets seen by compiled steps."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks.adam_reset import AdamResetCosine


def fit(callback, steps=4, rate=0.1, optimizer=None):
    """Weight after each of `steps` steps of loss `w * x`, gradients 1, 10, 100, ..."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].set_weights([np.zeros((1, 1))])
    model.compile(
        optimizer or keras.optimizers.Adam(rate, epsilon=1e-12),
        loss=lambda y, p: ops.mean(p),
        jit_compile=keras.backend.backend() == "jax",
    )
    x = 10.0 ** np.arange(steps, dtype="float32")[:, None]
    model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[callback])
    return model


def weight(model):
    return float(ops.convert_to_numpy(model.layers[0].kernel)[0, 0])


def test_the_rates_of_the_formula():
    callback = AdamResetCosine(period=2, decay=0.5, floor=0.25)
    callback._base = 2.0
    want = [2 + 0.25, 2 * np.exp(-0.5) * np.cos(np.pi / 8) + 0.25, 2 * np.exp(-1) + 0.25]
    np.testing.assert_allclose([callback.rate(step) for step in range(3)], want)


def test_after_a_reset_adam_takes_a_first_step():
    """Reset before every step, Adam moves by the rate whatever the gradient: 4 steps of 0.1."""
    model = fit(AdamResetCosine(period=1, decay=0.0, floor=0.0))
    assert weight(model) == pytest.approx(-0.4, rel=1e-5)  # float32 moments
    # Without resets the averages of growing gradients make steps of 0.1, 0.08, 0.07 and 0.064. The
    # rate falls to cos(pi / 4 * 3 / 1000), 3e-6 less.
    smooth = fit(AdamResetCosine(period=1000, decay=0.0, floor=0.0))
    assert weight(smooth) == pytest.approx(-0.3135, rel=5e-3)


def test_a_reset_under_loss_scaling_leaves_the_scale():
    """A scale of 0 made every loss and weight after the first reset NaN."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.1, epsilon=1e-12), initial_scale=8.0
    )
    model = fit(AdamResetCosine(period=1, decay=0.0, floor=0.0), optimizer=optimizer)
    assert weight(model) == pytest.approx(-0.4, rel=1e-5)  # float32 moments
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) == 8.0


def test_the_rate_moves_within_a_compiled_epoch_and_comes_back():
    """One step at 0.1, then steps at 0.1 exp(-20 t), which move nothing; a reset each time."""
    model = fit(AdamResetCosine(period=1, decay=20.0, floor=0.0))
    assert weight(model) == pytest.approx(-0.1, rel=1e-5)  # float32 moments
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.1)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="period must be a whole number"):
        AdamResetCosine(period=0)
    with pytest.raises(ValueError, match="decay must be a finite number"):
        AdamResetCosine(decay=-1)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 5)
    with pytest.raises(ValueError, match="sets the learning rate itself"):
        fit(AdamResetCosine(), optimizer=keras.optimizers.Adam(schedule))
    model, callback = keras.Sequential([keras.layers.Dense(1)]), AdamResetCosine()
    model.compile("adam", "mse", steps_per_execution=2)  # PyTorch refuses it in `fit` itself
    callback.set_model(model)
    with pytest.raises(ValueError, match=r"compile with steps_per_execution=1\. Got 2"):
        callback.on_train_begin()


def test_a_run_that_goes_on_has_the_rates_of_an_unbroken_one():
    def rates(initial_epoch):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(1e-3), "mse", jit_compile=False)
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: seen.append(
                float(ops.convert_to_numpy(model.optimizer.learning_rate))
            )
        )
        x = np.ones((3, 1), "float32")
        model.fit(
            x,
            x,
            batch_size=1,
            epochs=3,
            initial_epoch=initial_epoch,
            verbose=0,
            callbacks=[AdamResetCosine(period=2, decay=0.1), note],
        )
        return seen

    assert rates(2) == rates(0)[6:]
