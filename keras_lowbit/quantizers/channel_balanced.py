"""Activations on one scale that suits the majority of channels."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_choice, checked_number
from keras_lowbit.numerics import ranges
from keras_lowbit.quantizers.lsq import LSQ
from keras_lowbit.quantizers.state import PACKAGE

AGGREGATES = ("mean", "median", "trimmed")
# Channels of less variance say nothing about the scale.
DEAD = 1e-8
# Share of the channels that "trimmed" leaves out at either end.
TRIM = 0.1
CANDIDATES = 100
_LARGE = 1e30


@keras.saving.register_keras_serializable(package=PACKAGE)
class ChannelBalanced(LSQ):
    """LSQ with one scale, pulled towards least relative error of the channels.

        code = round(clip(x / scale, lo, hi))          out = scale * code
        e_c  = mean over all but the channel of (x_c - out_c)^2,     rho_c = e_c / Var(x_c)
        J    = aggregate over channels of rho_c        loss += balance * J

    Plain squared error is ruled by the few channels of large variance; relative errors are bounded
    alike, so no channel rules. J sees `x` as a constant: it tunes the range, not the features.
    `calibrate` takes the scale of least J.

    The term is added wherever a loss is computed, `evaluate` included, as regularizers are.
    `balance` is a variable; `callbacks.ChannelBalanceDecay` lets it fall to 0.

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU.
        agg: `"mean"`, `"median"` or `"trimmed"` (mean without a tenth of the channels at either
            end). Channels of variance below 1e-8 do not count.
        weight: start of the variable `balance` (lambda).
        max_value: as for `LSQ`.

    Raises:
        ValueError: an unknown aggregate, a negative weight, an axis, or a role other than
            `"activation"`.

    Gradient:
        That of `LSQ` for the task. J adds to the scale, codes being constant between their jumps,
        where J is continuous: `balance * aggregate of -2 mean(code (x - out)) / Var(x_c)`.

    Reference:
        Hoang, Do, Nguyen, Cheung, Direct Quantization for Training Highly Accurate Low Bit-width
        Deep Neural Networks, IJCAI 2020, arXiv:2012.13762: a reconstruction, only the abstract
        could be read. Task gradient: Esser et al., LSQ, arXiv:1902.08153, eq. 3.
    """

    roles = ("activation",)
    # `fit_scale` asks for values with their channels, which `calibrate` then keeps apart.
    keeps_channels = True

    def __init__(self, bits=8, *, agg="mean", weight=0.1, role="activation", axis=None, **kwargs):
        if axis is not None:
            raise ValueError(
                "ChannelBalanced: channels share one scale, which integer products ask for: "
                f"axis=None. Got {axis!r}"
            )
        super().__init__(bits, role=role, **kwargs)
        checked_choice(agg, AGGREGATES, who="ChannelBalanced: agg")
        self.agg = agg
        self.weight = checked_number(weight, who="ChannelBalanced: weight", least=0)

    def build(self, input_shape):
        """Create the scale, 1.0 until calibrated, and `balance`."""
        super().build(input_shape)
        self.balance = self.add_state("balance", self.weight)

    def to_codes(self, x):
        """`(codes, scale)`; see the class. Adds `balance * J` to the losses of the layer."""
        strength = ops.convert_to_tensor(self.balance)
        if self.switch is not None:
            strength = strength * ops.convert_to_tensor(self.switch)
        codes, fixed = super().to_codes(x)
        if self.resting:
            return codes, fixed
        self.add_loss(strength * self.objective(x, codes, self.scale_in_use(*self.bounds())))
        return codes, fixed

    def objective(self, x, codes, scale):
        """J of a batch that became `codes`, a scalar with a gradient to `scale` only."""
        x, codes, fixed = map(ops.stop_gradient, (x, codes, scale))
        axes = tuple(range(len(x.shape) - 1))
        off = x - fixed * codes
        # Value and slope from sums a channel: no pass backwards over the tensor.
        slope = -2.0 * ops.mean(off * codes, axis=axes)
        error = ops.mean(ops.square(off), axis=axes)
        variance = ops.var(x, axis=axes)
        alive = variance >= DEAD
        # Masked before the scale comes in: means of an empty batch are NaN, and so would be 0 of
        # their gradient.
        slope, error = (ops.where(alive, value, 0.0) for value in (slope, error))
        error = error + (scale - fixed) * slope
        relative = error / ops.where(alive, variance, 1.0)
        count = ops.sum(ops.cast(alive, "float32"))
        if self.agg == "mean":
            return ops.sum(ops.where(alive, relative, 0.0)) / ops.maximum(count, 1.0)
        ordered = ops.sort(ops.where(alive, relative, _LARGE))
        if self.agg == "median":
            first, last = ops.floor((count - 1.0) / 2.0), ops.floor(count / 2.0)
        else:
            first = ops.floor(TRIM * count)
            last = count - 1.0 - first
        ranks = ops.arange(ordered.shape[0], dtype="float32")
        kept = ops.logical_and(ranks >= first, ranks <= last)
        kept = ops.logical_and(kept, ordered < _LARGE)
        total = ops.sum(ops.where(kept, ordered, 0.0))
        return total / ops.maximum(ops.sum(ops.cast(kept, "float32")), 1.0)

    def fit_scale(self, x, method="mse"):
        """Take the scale of least J, whatever `method` says.

        Searches 100 scales, evenly in their logarithm, from 0.02 of the median channel's largest
        value to the largest of all, over `hi`; then 100 between the best one's neighbours.

        Args:
            x: reals, channels last; one dimension is one channel.
            method: not used.
        """
        x = np.asarray(x, np.float32)
        columns = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
        lo, hi = self.static_bounds()
        columns = columns[:, columns.var(axis=0) >= DEAD]
        if not columns.size:
            self.take_scale(ranges.scale_of(x.reshape(-1, 1), lo, hi, "minmax"))
            return
        tops = ranges.scale_minmax(columns, lo, hi).astype(np.float64)
        low, high = 0.02 * np.median(tops), tops.max()
        for _ in range(2):
            scales = np.geomspace(low, high, CANDIDATES)
            best = int(np.argmin([relative_error(columns, s, lo, hi, self.agg) for s in scales]))
            low, high = scales[max(best - 1, 0)], scales[min(best + 1, CANDIDATES - 1)]
        self.take_scale(np.maximum(scales[best], ranges.SMALLEST_SCALE).astype(np.float32))

    def get_config(self):
        """Arguments of the constructor; `weight` as it started."""
        config = super().get_config()
        config.pop("axis")
        return {**config, "agg": self.agg, "weight": self.weight}


def relative_error(x: np.ndarray, scale: float, lo: int, hi: int, agg: str = "mean") -> float:
    """J in NumPy, of live channels `(n, channels)`."""
    relative = np.sort(ranges.squared_error(x, scale, lo, hi) / x.var(axis=0))
    if agg == "median":
        return float(np.median(relative))
    cut = int(TRIM * len(relative)) if agg == "trimmed" else 0
    return float(np.mean(relative[cut : len(relative) - cut]))
