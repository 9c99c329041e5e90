"""One block as a Keras model that trains: loss, variables, rates."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_number
from keras_lowbit.distillation.divergence import divergence
from keras_lowbit.kinds import own_bias
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.transform.calibrate import activation_quantizers
from keras_lowbit.tuning import programs
from keras_lowbit.tuning.optimizer import RatedByIdentity
from keras_lowbit.tuning.variables import (
    ActivationScale,
    KernelInCodes,
    chosen,
    code_rate,
    is_fixed,
    standing_in,
)


@dataclass(frozen=True)
class Rates:
    """Learning rates at the start; they fall to zero along a cosine.

    Args:
        codes_4bit: of kernels in units of their codes, at 4 bits or fewer; 0, here and at 8 bits:
            all codes stay as they are.
        codes_8bit: the same at 8 bits; geometric between.
        biases: of biases and of batch norms' `beta`, in reals.
        log_scales: of logarithms of kernels' and activations' scales.

    Raises:
        ValueError: a rate that is not positive; of codes, one that is negative, or 0 at one width.
    """

    codes_4bit: float = 6e-3
    codes_8bit: float = 6e-2
    biases: float = 1e-3
    log_scales: float = 3e-3

    def __post_init__(self):
        for name in ("biases", "log_scales"):
            checked_number(getattr(self, name), who=f"Rates: {name}", above=0)
        for name in ("codes_4bit", "codes_8bit"):
            checked_number(getattr(self, name), who=f"Rates: {name}", least=0)
        if bool(self.codes_4bit) != bool(self.codes_8bit):
            raise ValueError(
                "Rates: codes move at all widths or at none: codes_4bit and codes_8bit are both "
                f"above 0, or both 0. Got {self.codes_4bit} and {self.codes_8bit}"
            )

    def schedule(self, steps):
        """The common factor of all rates over the steps of a block."""
        return keras.optimizers.schedules.CosineDecay(1.0, steps)


def squared_error(variances):
    """`loss(wanted, got)`: mean over outputs of squared error over the target's variance.

    A block's loss takes lists of tensors; one that weighs channels by what the logits feel goes in
    this place.
    """

    def loss(wanted, got):
        errors = [
            ops.mean(ops.square(b - a)) / spread
            for a, b, spread in zip(wanted, got, variances, strict=True)
        ]
        return sum(errors) / len(errors)

    return loss


def logit_error(wanted, got):
    """`KL(softmax(wanted) || softmax(got))` of the one tensor in each list, mean over the batch."""
    (wanted,), (got,) = wanted, got
    return divergence(wanted, got, 1.0)


class BlockModel(keras.Model):
    """A stretch of a quantized model with the variables of reconstruction.

    Called with the quantized inputs, or with `[quantized, float]` to mix: each element is the float
    one with probability `drop`. Layers compute in inference mode.

    Args:
        program: the stretch.
        loss: `loss(wanted, got)` of lists of tensors.
        drop: share of elements that stay real, at the input and at every grid inside.
        mix: whether float inputs come along.
        seed: of the draws.
        rates: learning rates.
        done: `id` of quantizers and variables that an earlier block has trained: shared layers
            stay as they are.
    """

    def __init__(self, program, *, loss, drop, mix, seed, rates, done, name="block"):
        super().__init__(name=name)
        self.program = program
        self.block_loss = loss
        self.drop, self.mix = drop, mix and drop > 0
        self.draws = keras.random.SeedGenerator(seed)
        self.rate_of: dict[int, float] = {}
        self.rates = rates
        states, biases = [], []
        for call in program.calls:
            layer = call.operation
            for kernel in kernels(layer):
                if kernel.quantizer is not None and id(kernel.quantizer) not in done:
                    done.add(id(kernel.quantizer))
                    add = self._adder(kernel.quantizer.bits)
                    states.append(KernelInCodes(call.name, kernel.latent, kernel.quantizer, add))
            for quantizer in activation_quantizers(layer):
                if not is_fixed(quantizer) and id(quantizer) not in done:
                    done.add(id(quantizer))
                    add = self._adder(quantizer.bits)
                    state = ActivationScale(call.name, quantizer, add, drop, self.draws)
                    states.append(state)
            bias = own_bias(call)
            if bias is not None and id(bias) not in done:
                done.add(id(bias))
                self.rate_of[id(bias)] = rates.biases
                biases.append(bias)
        self.states, self.biases = states, biases

    def _adder(self, bits):
        codes = code_rate(bits, self.rates.codes_4bit, self.rates.codes_8bit)

        def add(name, value):
            value = np.asarray(value, np.float32)
            variable = self.add_weight(
                name=f"{name}_{len(self.rate_of)}",
                shape=value.shape,
                dtype="float32",
                initializer="zeros",
                autocast=False,
                trainable=name != "codes" or codes > 0,
            )
            variable.assign(value)
            self.rate_of[id(variable)] = codes if name == "codes" else self.rates.log_scales
            return variable

        return add

    def build(self, input_shape=None):
        """All variables exist already."""
        self.built = True

    def prepare(self, steps, jit_compile):
        """Compile for a number of steps."""
        optimizer = RatedByIdentity(self.rate_of, learning_rate=self.rates.schedule(steps))
        self.compile(optimizer=optimizer, jit_compile=jit_compile)

    def call(self, inputs):
        """Outputs of the block, a list."""
        feeds = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if self.mix:
            quantized, floating = feeds
            keep = chosen(floating, self.drop, self.draws)
            feeds = [ops.where(keep, floating, quantized)]
        # No `training` argument here, so layers inside see none: inference mode.
        with standing_in(self.states):
            return programs.run(self.program, feeds)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The block's loss."""
        return self.block_loss(_as_list(y), _as_list(y_pred))

    def write(self):
        """Kernels and scales into the layers; biases are the layers' own."""
        for state in self.states:
            state.write()

    def targets(self):
        """Variables of the layers that training changes, in a fixed order."""
        found = []
        for state in self.states:
            found.append(state.quantizer.scale)
            if isinstance(state, KernelInCodes):
                found.append(state.latent)
        return [*found, *self.biases]


def _as_list(tensors):
    flat = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return [ops.convert_to_tensor(t) for t in flat]
