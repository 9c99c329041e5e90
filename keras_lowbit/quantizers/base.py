"""What a quantizer is: a small Keras layer that turns reals into codes and a scale."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics import backend, ranges, uniform
from keras_lowbit.numerics.grid import MAX_BITS, ROLES, Grid, check_bits, code_bounds
from keras_lowbit.quantizers.state import PositiveScale, constant, count_features
from keras_lowbit.quantizers.switch import Switched


class Quantizer(Switched, keras.layers.Layer):
    """Turns reals into whole-number codes with a scale, `real = scale * code`.

    Everything a schedule moves (`bits`) is a non-trainable variable, so compiled steps see it.
    Under mixed precision a quantizer keeps computing in float32: bfloat16 loses codes.

    A subclass defines `build` (its variables), `scale_in_use` and `to_codes`. One that keeps its
    scale in a variable `scale` (`add_scale`) inherits the hand-over of `set_bits`, `fit_scale`
    and `grid`.

    Attributes:
        roles: roles that the method is defined for.
        breaks: laws of quantizers (`"idempotent"`) that the method does not keep; its docstring
            says why.
        moves_bits: whether `set_bits` can change the width of a built quantizer; schedules of bits
            pass the others by.
        largest_bits: bits that `set_bits` takes at most.
        fits_data: whether `fit_scale` looks at data; `calibrate` leaves the others on.
        counts_shares: whether `fit_scale` looks at how many values lie where.
        keeps_channels: whether `fit_scale` takes `(n, channels)`, positions with their channels.
        pad_code: the code that SAME padding puts around a tensor.
        unsaved: names of the variables that are in no file.

    Args:
        bits: width of a code, 1..16.
        signed: False after a ReLU: codes start at 0.
        role: `"kernel"` or `"activation"`; decides the ends of the grid
            (`numerics.grid.code_bounds`) and what the gradient scale counts.
        axis: axis or axes of the input that keep a scale of their own; `None` for one scale.
        target_bits: width that a descent ends at, kept while `bits` moves; `None` for `bits`.
        enabled: False lets reals pass unchanged from the start (`add_switch`).

    Raises:
        ValueError: `bits` or `role` out of range.
    """

    roles: tuple[str, ...] = ROLES
    breaks: frozenset[str] = frozenset()
    moves_bits = True
    fits_data = True
    counts_shares = False
    keeps_channels = False
    pad_code = 0
    unsaved = frozenset({"switch", "pull"})
    scale = None
    offset = 0.0  # reals that code 0 stands for
    largest_bits = MAX_BITS

    def __init__(
        self,
        bits=8,
        *,
        signed=True,
        role="kernel",
        axis=None,
        target_bits=None,
        enabled=True,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        if role not in self.roles:
            raise ValueError(
                f"{type(self).__name__}: role must be one of {self.roles}. Got {role!r}"
            )
        self._initial_bits = check_bits(bits, who=type(self).__name__)
        self.target_bits = self._initial_bits
        if target_bits is not None:
            self.target_bits = check_bits(target_bits, who=type(self).__name__)
        self.signed = bool(signed)
        self.role = role
        # Set while `calibrate` looks: called with (quantizer, reals); they pass unchanged unless it
        # returns True.
        self.observer = None
        self._initially_enabled = bool(enabled)
        # Set inside `at_rest`.
        self.resting = False
        self.axis = (axis,) if isinstance(axis, int) else None if axis is None else tuple(axis)

    def build(self, input_shape):
        """Create `bits` and `calibrated`; `input_shape` is that of the tensor to quantize."""
        self._features = count_features(input_shape, self.role, self.axis)
        self.bits_variable = self.add_state("bits", self._initial_bits)
        # 1.0 once a scale came from data; an exporter refuses quantizers that never saw any.
        self.calibrated = self.add_state("calibrated", 0.0)
        self.built = True
        if not self._initially_enabled:
            self.switch = self.add_state("switch", 0.0)

    def add_state(self, name, value, shape=(), *, trainable=False, **options):
        """A variable that starts at `value` and stays float32 under mixed precision."""
        with backend.unscoped():
            return self.add_weight(
                name=name,
                shape=shape,
                trainable=trainable,
                initializer=constant(value),
                autocast=False,
                **options,
            )

    def add_scale(self, input_shape, *, trainable):
        """Create the variable `scale`, 1.0 until calibrated."""
        self.scale = self.add_state(
            "scale",
            1.0,
            self.scale_shape(input_shape),
            trainable=trainable,
            constraint=PositiveScale() if trainable else None,
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether a scale came from data."""
        return bool(float(ops.convert_to_numpy(self.calibrated)))

    @property
    def bits(self) -> int:
        """Width of a code now."""
        if not self.built:
            return self._initial_bits
        return int(ops.convert_to_numpy(self.bits_variable))

    @property
    def code_width(self) -> int:
        """Bits of a two's complement that holds every code of a kernel.

        That is `bits`, and one more where codes pass `2^(bits - 1)`, as DoReFa's odd numbers do.

        Raises:
            ValueError: quantization is switched off.
        """
        self._check_enabled()
        bits = self.bits
        return bits + int(max(map(abs, self.static_bounds())) > 2 ** (bits - 1))

    def set_bits(self, bits: int) -> None:
        """Change the width of a code; compiled steps see it.

        A scale variable keeps the representable range: `scale' = scale * hi / hi'`. From 1 bit
        upwards the scale last used at 2 or more bits is what is handed over.

        Raises:
            ValueError: `bits` out of range; nothing is changed.
        """
        bits = check_bits(bits, who=self.name)
        if self.built:
            if self.scale is not None:
                _, before = self.static_bounds()
                _, after = code_bounds(bits, signed=self.signed, role=self.role)
                self.scale.assign(ops.convert_to_numpy(self.scale) * np.float32(before / after))
            self.bits_variable.assign(float(bits))
        self._initial_bits = bits

    def bounds(self):
        """Lowest and highest code as tensors."""
        return code_bounds(self.bits_variable, signed=self.signed, role=self.role)

    def static_bounds(self) -> tuple[int, int]:
        """Lowest and highest code as ints."""
        return code_bounds(self.bits, signed=self.signed, role=self.role)

    def scale_shape(self, input_shape) -> tuple[int, ...]:
        """Shape of a scale variable that broadcasts over `input_shape`."""
        if self.axis is None:
            return ()
        rank = len(input_shape)
        kept = sorted(a % rank for a in self.axis)
        if kept != list(range(rank - len(kept), rank)):
            raise ValueError(f"{self.name}: axis must name the last axes. Got {self.axis}")
        return tuple(input_shape[a] for a in kept)

    def columns(self, x: np.ndarray) -> np.ndarray:
        """`x` as `(n, channels)`, one column for each scale."""
        shape = self.scale_shape(x.shape)
        return x.reshape(-1, int(np.prod(shape, dtype=int)))

    def fit_scale(self, x: np.ndarray, method: str = "mse") -> None:
        """Set the state from data and mark the quantizer calibrated.

        Args:
            x: reals of the shape that `to_codes` gets (without `axis`: any shape).
            method: one of `numerics.ranges.METHODS`; quantizers with a method of their own use
                that.
        """
        self.take_scale(ranges.scale_of(self.columns(x), *self.static_bounds(), method))

    def take_scale(self, scale: np.ndarray) -> None:
        """Set the variable `scale` and mark the quantizer calibrated."""
        self.scale.assign(scale.reshape(self.scale.shape))
        self.calibrated.assign(1.0)

    def scale_in_use(self, lo, hi):
        """Reals per code, as a tensor, on a grid `lo..hi`."""
        return ops.convert_to_tensor(self.scale)

    def uniform_codes(self, x, scale, lo, hi, gradient_scale=None):
        """`(codes, scale)` by `numerics.uniform.quantize`.

        Signed kernels at 1 bit take the binary branch of the same graph, `numerics.uniform.signs`.
        """

        def steps():
            return uniform.quantize(x, scale, lo, hi, gradient_scale), ops.stop_gradient(scale)

        if not (self.signed and self.role == "kernel"):
            return steps()
        binary = self.bits_variable < 1.5
        return backend.either(binary, lambda: uniform.signs(x, self.shared_axes(x)), steps)

    def shared_axes(self, x) -> tuple[int, ...]:
        """Axes of `x` that share a scale: all but those of `axis`."""
        return tuple(range(len(x.shape) - len(self.axis or ())))

    def to_codes(self, x):
        """`(codes, scale)`: whole numbers and a scale without gradient.

        Gradient: readers multiply by the scale; `numerics.uniform` states the convention.
        """
        raise NotImplementedError(f"{type(self).__name__} must define to_codes")

    def encode(self, x):
        """`to_codes`; the reals with scale 1 while an observer looks or the switch is off."""
        if self.observer is not None and not self.observer(self, x):
            # Readers add the offset, so it is taken off as it will be on the grid.
            return (x - self.offset if self.offset else x), ops.ones(())
        x = ops.cast(x, "float32")
        codes, scale = self.to_codes(x)
        if self.switch is None:
            return codes, scale
        on = self.switch > 0.5
        # Not `x / scale`: times the scale that is another last bit than `x`.
        reals = x - self.offset if self.offset else x
        return ops.where(on, codes, reals), ops.where(on, scale, 1.0)

    @contextlib.contextmanager
    def at_rest(self):
        """Inside the block values of another tensor are encoded: nothing is learned of them.

        Quantizers that add a loss or move their range with each batch (`breaks`) leave it there.
        """
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    def call(self, inputs):
        """Values on the grid, `scale * code`."""
        codes, scale = self.encode(inputs)
        return codes * scale

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def grid(self) -> Grid:
        """The static grid, with the scale as NumPy float32.

        Raises:
            ValueError: a kernel at 1 bit, whose scale is not state but the kernel's mean
                magnitude; `encode(kernel)` gives it. Or quantization is switched off, or training
                left a scale that is not positive and finite.
        """
        self._check_enabled()
        if self.signed and self.role == "kernel" and self.bits == 1:
            raise ValueError(
                f"{self.name}: at 1 bit the scale is computed from the kernel: call "
                "encode(kernel) for codes and scale"
            )
        lo, hi = self.static_bounds()
        scale = self.scale_in_use(
            ops.convert_to_tensor(float(lo)), ops.convert_to_tensor(float(hi))
        )
        scale = np.float32(ops.convert_to_numpy(scale))
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"{self.path or self.name}: the scale is {np.min(scale):.3g}; codes need one "
                "that is positive and finite. Go back to a checkpoint with a smaller learning "
                "rate; the callback ScaleGuard stops training where a scale breaks"
            )
        return Grid(scale, lo, hi, self.bits)

    def save_own_variables(self, store):
        """All variables but those of `unsaved`."""
        for i, variable in enumerate(self._stored()):
            store[f"{i}"] = variable

    def load_own_variables(self, store):
        """All variables but those of `unsaved`, which keep their values."""
        stored = self._stored()
        if len(store.keys()) != len(stored):
            raise ValueError(
                f"{self.path or self.name} has {len(stored)} variables, "
                f"{[v.name for v in stored]}. Got {len(store.keys())} from the file: it belongs to "
                "another model"
            )
        for i, variable in enumerate(stored):
            variable.assign(store[f"{i}"])

    def _stored(self):
        return [v for v in self.weights if v.name not in self.unsaved]

    def get_config(self):
        """Arguments of the constructor; `bits` as it is now."""
        config = super().get_config()
        config.pop("dtype", None)
        axis = None if self.axis is None else list(self.axis)
        return {
            **config,
            "bits": self.bits,
            "target_bits": self.target_bits,
            "signed": self.signed,
            "role": self.role,
            "axis": axis,
            # Left out where it is on, so that files are those of earlier versions.
            **({} if self.enabled or self.off_for_a_step else {"enabled": False}),
        }
