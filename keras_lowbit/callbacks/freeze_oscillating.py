"""Weights that hop between two codes, and are stopped."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.callbacks.penalties import kernels_with_bins
from keras_lowbit.callbacks.schedules import half_cosine
from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.layers.packed_kernels import Kernel
from keras_lowbit.optimizers import unwrapped

_STATE = ("codes", "direction", "frequency", "mean", "frozen")


class FreezeOscillating(keras.callbacks.Callback):
    """Freezes weights whose code keeps going back and forth.

    After each step of the optimizer, for each weight of a kernel with few bits, with `c_t` its
    code; batches that only gather gradients are none:

        o_t = 1 where c_t != c_(t-1) and the last change before went the other way, else 0
        f_t = momentum * o_t + (1 - momentum) * f_(t-1)              f_0 = 0
        m_t = momentum * c_t + (1 - momentum) * m_(t-1)              m_0 = c_0
        frozen at round(m_t) from the step on in which f_t > threshold(t)

    A frozen latent weight is put back on `code * scale`, the middle of its bin, after every step
    for the rest of the `fit`; its scale goes on training. The threshold falls by a half cosine over
    the whole `fit`. Each epoch logs `frozen_weights`, the share of the weights followed.

    Kernels are followed while they have 2 to `max_bits` bits and are switched on, asked at the
    beginning of each epoch; a change of bits starts them afresh. So list it behind callbacks that
    move bits or switches. Learned levels and DoReFa kernels have no bins and are left alone.

    The state, 17 bytes a weight, lives in tensors of the backend and nothing is fetched between
    steps: about 15 small operations a kernel and step. It is in no weights file: killed training
    that shall go on takes `Resume(directory, also=[freeze])`; with `BackupAndRestore` counts start
    afresh.

    Args:
        threshold: first and last, of the frequency: 0.1 is one hop in ten steps.
        momentum: of both moving averages.
        max_bits: widest kernels that are followed.

    Raises:
        ValueError: numbers out of range; when training starts, a model without such kernels, or
            compiled with `steps_per_execution` above 1, where steps pass unseen.

    Reference:
        Nagel, Fournarakis, Bondarenko, Blankevoort, Overcoming Oscillations in Quantization-Aware
        Training, ICML 2022, arXiv:2203.11086: iterative weight freezing.
    """

    def __init__(
        self,
        threshold: tuple[float, float] = (0.1, 0.01),
        momentum: float = 0.01,
        max_bits: int = 4,
    ):
        super().__init__()
        if len(threshold) != 2 or not all(0 <= t <= 1 for t in threshold):
            raise ValueError(
                "FreezeOscillating: threshold is the first and the last frequency, both in 0..1. "
                f"Got {threshold!r}"
            )
        self.threshold = tuple(map(float, threshold))
        self.momentum = checked_number(momentum, who="FreezeOscillating: momentum", above=0, most=1)
        self.max_bits = checked_count(max_bits, who="FreezeOscillating: max_bits", least=2)
        self._kernels: dict[str, Kernel] = {}
        self._followed: dict[str, _Followed] = {}
        self._epoch, self._updates = 0, None

    def threshold_at(self, done: float) -> float:
        """The threshold after the share `done` of the training."""
        first, last = self.threshold
        return first + (last - first) * half_cosine(done)

    def set_model(self, model):
        """Find the kernels."""
        super().set_model(model)
        self._kernels = {
            name: kernel
            for name, kernel in kernels_with_bins(model).items()
            if 2 <= kernel.quantizer.target_bits <= self.max_bits
        }

    def on_train_begin(self, logs=None):
        """Check the model and forget an earlier `fit`."""
        model = self.model
        if not self._kernels:
            raise ValueError(
                f"FreezeOscillating: {model.name} has no kernel of 2 to {self.max_bits} bits. "
                "Quantize it at the scheme to end with, such as quantize_model(model, 'w4a4'), or "
                "give max_bits"
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "FreezeOscillating looks at every step: compile with steps_per_execution=1. "
                f"Got {model.steps_per_execution}"
            )
        self._followed = {}
        self._updates = self._updates_of(self.model.optimizer)

    def on_epoch_begin(self, epoch, logs=None):
        """Follow the kernels that have few bits now."""
        self._epoch = epoch
        for name, kernel in self._kernels.items():
            bits = kernel.quantizer.bits
            known = self._followed.get(name)
            if not 2 <= bits <= self.max_bits or not kernel.quantizer.enabled:
                self._followed.pop(name, None)
            elif known is None or known.bits != bits:
                self._followed[name] = _Followed(kernel, bits)

    def on_train_batch_end(self, batch, logs=None):
        """Count, freeze, and put frozen weights back."""
        model = self.model  # On JAX this hands the step's state back, so that variables can move.
        if not self._was_update(model.optimizer):
            return
        steps, epochs = self.params.get("steps"), self.params["epochs"]
        # A data set of unknown length goes by epochs.
        within = (batch + 1) / steps if steps else 0.0
        threshold = self.threshold_at((self._epoch + within) / epochs)
        for followed in self._followed.values():
            followed.step(threshold, self.momentum)

    def _was_update(self, optimizer):
        """Whether the batch moved weights; fetches a number only where some batches do not."""
        before, self._updates = self._updates, self._updates_of(optimizer)
        return self._updates is None or self._updates != before

    @staticmethod
    def _updates_of(optimizer):
        """Steps that an optimizer has made which gathers gradients; `None` of any other."""
        own = unwrapped(optimizer)  # or none, under a `train_step` of somebody's own
        gathers = getattr(own, "gradient_accumulation_steps", None)
        return int(own.iterations) if gathers else None

    def on_epoch_end(self, epoch, logs=None):
        """Log the share of frozen weights."""
        if logs is not None:
            frozen = [followed.numpy("frozen") for followed in self._followed.values()]
            total = sum(array.size for array in frozen)
            logs["frozen_weights"] = float(sum(array.sum() for array in frozen) / max(total, 1))

    def shares(self) -> dict[str, float]:
        """Share of frozen weights of each kernel that is followed now, by layer name."""
        return {name: float(f.numpy("frozen").mean()) for name, f in self._followed.items()}

    def get_state(self) -> dict[str, np.ndarray]:
        """What was counted so far, for a backup."""
        state = {}
        for name, followed in self._followed.items():
            state[f"{name}:bits"] = np.asarray(followed.bits)
            state.update({f"{name}:{part}": followed.numpy(part) for part in _STATE})
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `get_state`; after `on_train_begin`."""
        names = [key.removesuffix(":bits") for key in state if key.endswith(":bits")]
        self._followed = {
            name: _Followed(
                self._kernels[name],
                int(state[f"{name}:bits"]),
                {part: state[f"{name}:{part}"] for part in _STATE},
            )
            for name in names
        }
        # Whoever sets the state has set the optimizer's first.
        self._updates = self._updates_of(self.model.optimizer)


class _Followed:
    """A kernel and what is known of each of its weights.

    Args:
        kernel: the latent and its quantizer.
        bits: width of its codes.
        state: arrays of an earlier `_Followed`, by name; `None` starts afresh.
    """

    def __init__(self, kernel, bits, state=None):
        self.kernel, self.bits = kernel, bits
        if state is None:
            codes, _ = self._encoded()
            self.codes, self.mean = codes, codes
            self.direction = self.frequency = ops.zeros_like(codes)
            self.frozen = ops.zeros_like(codes, dtype="bool")
        else:
            for name, array in state.items():
                setattr(self, name, ops.convert_to_tensor(array))

    def numpy(self, part) -> np.ndarray:
        """One part of the state."""
        return np.array(ops.convert_to_numpy(getattr(self, part)))

    def step(self, threshold, momentum):
        """Count a step of the optimizer, and undo it where weights are frozen."""
        codes, scale = self._encoded()
        change = codes - self.codes
        hops = ops.cast(change * self.direction < 0, "float32")
        self.frequency = self.frequency + momentum * (hops - self.frequency)
        self.mean = self.mean + momentum * (codes - self.mean)
        self.direction = ops.where(change == 0, self.direction, ops.sign(change))
        over = self.frequency > threshold
        # Of a frozen weight `self.codes` is the code it is frozen at.
        halted = ops.where(self.frozen, self.codes, ops.round(self.mean))
        self.frozen = ops.logical_or(self.frozen, over)
        self.codes = ops.where(self.frozen, halted, codes)
        latent = self.kernel.latent
        moved = ops.convert_to_tensor(latent)
        latent.assign(ops.where(self.frozen, self.codes * scale, moved))

    def _encoded(self):
        """`(codes, scale)` of the latent as it is, without a graph of gradients behind them."""
        latent = ops.stop_gradient(ops.convert_to_tensor(self.kernel.latent))
        codes, scale = self.kernel.quantizer.to_codes(latent)
        return ops.stop_gradient(codes), ops.stop_gradient(scale)
