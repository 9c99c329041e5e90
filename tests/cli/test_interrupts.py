"""Signals whose exception Keras swallows still end a training."""

import signal

import keras
import numpy as np
import pytest

from keras_lowbit.cli.interrupts import Interrupts


def model():
    made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


class Swallowed(keras.callbacks.Callback):
    """SIGINT in a batch, from 1, where nothing passes."""

    def __init__(self, when):
        super().__init__()
        self.when, self.seen = when, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.when:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("when", [2, 8], ids=["with a batch behind it", "last batch"])
def test_an_exception_that_was_swallowed_is_raised_at_the_next_occasion(when):
    before = signal.getsignal(signal.SIGINT)
    swallowed = Swallowed(when)
    x = np.ones((64, 2), np.float32)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        model().fit(x, x[:, :1], batch_size=8, verbose=0, callbacks=[interrupts, swallowed])
    assert swallowed.seen == when
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_that_do_not_raise_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.error is None
    finally:
        signal.signal(signal.SIGTERM, before)
