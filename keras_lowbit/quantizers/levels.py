"""Kernels whose levels are trained: a codebook in place of a grid."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_choice
from keras_lowbit.numerics import uniform
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.numerics.grid import MAX_EXPORT_BITS, check_bits
from keras_lowbit.numerics.ranges import SMALLEST_SCALE
from keras_lowbit.quantizers.base import Quantizer
from keras_lowbit.quantizers.level_modes import MODES, SELECTOR_BITS
from keras_lowbit.quantizers.lloyd import NOTHING, levels_of
from keras_lowbit.quantizers.state import PACKAGE

INITS = ("lloyd", "uniform")
LARGEST_CODE = 127  # of the int8 grid that `snap` puts levels on


@keras.saving.register_keras_serializable(package=PACKAGE)
class Levels(Quantizer):
    """`K = 2^bits` learned levels, of which each weight takes one.

        codebook     the nearest of v_1 < ... < v_K:   t_k = (v_k + v_{k+1}) / 2
                     q = v_1 + sum_k (v_{k+1} - v_k) 1[x > t_k]
        basis        q = sum_i v_i sign(x_i)           i = 1..bits, latents x_i of its own
        selector     the level of its largest logit    K logits of its own, for each weight

    The levels of `codebook` and `selector` never cross: `v_1` is free, and
    `v_{k+1} = v_k + width * softplus(g_k / width)` with the mean gap `width` of the first fit, in
    whose units softplus is neither flat nor linear. `codebook` makes no tensor of K copies of the
    kernel. In the other two modes the kernel's own latent is where training started from and gets
    no gradient any more; the quantizer holds what chooses, in checkpoints too, packed or not.

    Until `snap` the levels are reals: `scale = max |v| / 127` and "codes" `v / scale` that are
    not whole, so nothing is exported. `snap` (`transform.snap_levels` for a model) rounds them on
    that int8 grid, an error of half a step, at most 0.4 % of the largest level; from then on levels
    rest, codes are whole, and latent weights go on training.

    Args:
        bits: 1..8. Fixed: levels are variables, so their number does not change.
        per_filter: levels for each filter (`axis`), not for the whole kernel.
        mode: `"codebook"`, `"basis"` or `"selector"` (bits up to 2: it keeps K copies of the
            kernel; `callbacks.TemperatureAnnealing` lowers its variable `temperature`).
        init: `"lloyd"` (k-means of the kernel from Gaussian quantiles) or `"uniform"` (evenly
            spaced over the kernel's range).
        axis: axes that keep levels of their own with `per_filter`; ignored without, because layers
            name one.

    Raises:
        ValueError: bits out of range (fewer than two levels; above 2 for a selector), an unknown
            mode or start.

    Gradient:
        With `dq` the gradient to `q`, exactly `dL/dv_k = sum of dq over the weights at level k`,
        times `1 / sqrt(N max(2^(bits-1) - 1, 1))`, N the weights that share the levels; from there
        to `v_1` and `g_k`, or to the basis values. Snapped levels get none. By mode:
        codebook: to `x` `dq` where `v_1 - r <= x <= v_K + r'`, with r and r' half of the outer
        gaps, else 0; thresholds get none. Basis: to `x_i` `dq v_i` where `|x_i| <= 1`, else 0.
        Selector, with `p = softmax(logits / temperature)`: to logit k
        `dq p_k (v_k - sum_j p_j v_j) / temperature`.

    Reference:
        Hoang, Do, Nguyen, Cheung, Direct Quantization for Training Highly Accurate Low Bit-width
        Deep Neural Networks, IJCAI 2020, arXiv:2012.13762: a reconstruction, only the abstract
        could be read. Gradient scale: Esser et al., LSQ, arXiv:1902.08153, section 2.2.
    """

    roles = ("kernel",)
    moves_bits = False

    def __init__(
        self, bits=2, *, per_filter=False, mode="codebook", init="lloyd", axis=None, **kwargs
    ):
        check_level_bits(bits)
        self._given_axis = axis
        super().__init__(bits, axis=axis if per_filter else None, **kwargs)
        self.per_filter = bool(per_filter)
        self._mode_name = checked_choice(mode, tuple(MODES), who="Levels: mode")
        if mode == "selector" and bits > SELECTOR_BITS:
            raise ValueError(
                f"Levels: a selector keeps 2^bits copies of the kernel: bits 1 or 2. Got {bits}; "
                "take mode='codebook' or 'basis'"
            )
        self.init = checked_choice(init, INITS, who="Levels: init")

    def build(self, input_shape):
        """Create levels at -1..1, until `fit_scale` sees the kernel."""
        super().build(input_shape)
        self.count = 2**self._initial_bits
        shape = self.scale_shape(input_shape)
        self.mode = MODES[self._mode_name]()
        self.mode.build(self, tuple(input_shape), shape)
        self.snapped = self.add_state("snapped", 0.0)
        self.snapped_codes = self.add_state("snapped_codes", 0.0, (self.count, *shape))
        self.snapped_scale = self.add_state("snapped_scale", 1.0, shape)

    def set_bits(self, bits):
        """Refuse another width than the one built."""
        check_bits(bits, who=self.name)
        if bits != self._initial_bits:
            raise ValueError(
                f"{self.name}: {2**self._initial_bits} levels are variables and stay as many. Got "
                f"bits={bits}; quantize the float model at that width, or use 'lsq' for a descent"
            )

    def bounds(self):
        """Ends of the int8 grid, as tensors."""
        hi = ops.full((), float(LARGEST_CODE))
        return -hi, hi

    def static_bounds(self):
        """Ends of the int8 grid."""
        return -LARGEST_CODE, LARGEST_CODE

    @property
    def code_width(self):
        """8: codes are those of the int8 grid that levels are snapped to.

        Raises:
            ValueError: levels were not snapped.
        """
        self._check_enabled()
        return 8

    def _check_enabled(self):
        super()._check_enabled()
        if not self.is_snapped:
            raise ValueError(
                f"{self.path or self.name}: its levels are reals, which have no integer codes. "
                "Call keras_lowbit.transform.snap_levels(model) before the last epochs, or before "
                "the export"
            )

    @property
    def is_snapped(self) -> bool:
        """Whether levels sit on the int8 grid."""
        return self.built and bool(ops.convert_to_numpy(self.snapped) > 0.5)

    def levels(self):
        """The learned levels, as a tensor `(K, *axes that keep their own)`."""
        return self.mode.levels(self)

    def scale_in_use(self, lo, hi):
        """Refuse: levels are no grid."""
        raise ValueError(
            f"{self.name}: learned levels are no uniform grid: call encode(kernel) for codes and "
            "scale"
        )

    def to_codes(self, x):
        """`(codes, scale)`; see the class."""
        learned = self.levels()
        damping = (float(self._features) * max(2 ** (self._initial_bits - 1) - 1, 1)) ** -0.5
        held = ops.stop_gradient(learned)
        scale = self.mode.reach(self, held) / LARGEST_CODE
        snapped = self.snapped > 0.5
        kept = ops.convert_to_tensor(self.snapped_scale)
        scale = ops.where(snapped, kept, ops.maximum(scale, SMALLEST_SCALE))
        inverse = 1.0 / scale
        # In units of the scale; what a level feels is `damping` of it.
        whole = ops.convert_to_tensor(self.snapped_codes)
        free = ops.where(snapped, 0.0, damping) * inverse
        codes = ops.where(snapped, whole, held * inverse)
        levels = uniform.straight_through(codes, (learned, ops.broadcast_to(free, held.shape)))
        reals = codes * scale
        out = ops.zeros_like(ops.stop_gradient(x)) + levels[0]
        for k, mask in enumerate(self.mode.masks(self, ops.stop_gradient(x), reals), 1):
            # Not `out + step * above`: sums of steps would leave the levels' last bits.
            out = ops.where(mask, levels[k], out)
        for latent, slope in self.mode.slopes(self, x, reals):
            out = out + (latent - ops.stop_gradient(latent)) * ops.stop_gradient(slope * inverse)
        return out, ops.stop_gradient(scale)

    def fit_scale(self, x, method="mse"):
        """Set the levels from a kernel, as `init` says, and take a snap back."""
        x = np.asarray(x, np.float64)
        columns = self.columns(x)
        if self.init == "lloyd":
            found = [levels_of(column, self.count) for column in columns.T]
        else:
            found = [self._evenly(np.abs(column).max() or NOTHING) for column in columns.T]
        levels = np.stack(found, axis=-1).reshape(self.count, *self.scale_shape(x.shape))
        self.mode.start(self, x, levels, refine=self.init == "lloyd")
        self.snapped.assign(0.0)
        self.calibrated.assign(1.0)

    def snap(self) -> None:
        """Put the levels on the int8 grid `scale = max |v| / 127`; they rest from now on."""
        levels = float64_of(self.levels())
        scale = np.maximum(np.abs(levels).max(axis=0) / LARGEST_CODE, SMALLEST_SCALE)
        scale = np.float32(scale)
        self.snapped_codes.assign(np.rint(levels / scale).astype(np.float32))
        self.snapped_scale.assign(scale)
        self.snapped.assign(1.0)

    def code_table(self) -> np.ndarray:
        """The whole-number codes of the levels, sorted, `(K, *axes that keep their own)`.

        Raises:
            ValueError: levels were not snapped.
        """
        self._check_enabled()
        return np.sort(np.asarray(ops.convert_to_numpy(self.snapped_codes), np.int16), axis=0)

    def from_codes(self, codes, scale):
        """Latent weights that take these codes again: the levels themselves."""
        return codes.astype(np.float32) * scale

    def _evenly(self, reach):
        return np.linspace(-reach, reach, self.count)

    def get_config(self):
        """Arguments of the constructor."""
        axis = self._given_axis
        return {
            **super().get_config(),
            "axis": axis if axis is None or isinstance(axis, int) else list(axis),
            "per_filter": self.per_filter,
            "mode": self._mode_name,
            "init": self.init,
        }


def check_level_bits(bits) -> None:
    """`ValueError` unless `2^bits` is a number of levels that int8 holds, two at least."""
    if check_bits(bits, who="Levels (2^bits levels, two at least)") > MAX_EXPORT_BITS:
        raise ValueError(f"Levels: bits must be from 1 to {MAX_EXPORT_BITS}. Got {bits}")
