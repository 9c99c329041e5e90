"""Signals that end a training, on every backend."""

from __future__ import annotations

import functools
import signal
import threading

import keras


class Interrupts(keras.callbacks.Callback):
    """Raises the exception of a signal once more where Keras swallowed it.

    Keras turns the logs of a step into numbers in a `try` that lets no exception through
    (`pythonify_logs`), and that is where a step on JAX is waited for: Ctrl-C is lost there.

    Use it as a context around `fit`, and as one of its callbacks. Handlers that raise, Python's own
    of SIGINT or one of SIGTERM, work as before; the others, and threads, are left alone.
    """

    def __init__(self):
        super().__init__()
        self.error: BaseException | None = None
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    signal.signal(number, functools.partial(self._handle, handler))
                    self._handlers[number] = handler
        return self

    def __exit__(self, kind, error, _):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if error is None:
            self.on_train_batch_begin(0)  # there was no batch behind the one of the signal

    def _handle(self, handler, number, frame):
        try:
            handler(number, frame)
        except BaseException as error:
            self.error = error
            raise

    def on_train_batch_begin(self, batch, logs=None):
        """Raise what was lost."""
        if self.error is not None:
            raise self.error

    def on_test_batch_begin(self, batch, logs=None):
        """Raise what was lost."""
        self.on_train_batch_begin(batch)
