"""Tensors of a quantized model while it is built: on grids where they are read so.

`transform.plan` says which grid a tensor gets; here it is made, once, when something reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keras_lowbit import layers, quantizers
from keras_lowbit.kinds import kind_of
from keras_lowbit.scheme import SIGN
from keras_lowbit.transform.plan import STREAM_BITS

# Quantizers of activations that know of a ReLU6 in front.
_TAKE_A_LIMIT = ("lsq", "channel_balanced")


@dataclass
class Entry:
    """A tensor of the new model: reals, or a pair of codes and scale with its width.

    `offset` is what code 0 of the pair stands for, and `centred` the tensor on a grid where that
    is 0.0. `nonnegative` is said of pooled images alone: whether no code is below 0.
    """

    values: Any = None
    pair: Any = None
    bits: int | None = None
    offset: float = 0.0
    nonnegative: bool | None = None
    centred: Entry | None = None
    made: dict = field(default_factory=dict)


def quantizer_of(role, name, options, **given):
    """The quantizer that a scheme names, with the scheme's options.

    Args:
        role: `"kernel"` or `"activation"`, whose options they are.
        name: the scheme's name of it.
        options: the scheme's arguments for it, which win over those given.
        **given: arguments that follow from the model and the scheme's bits.

    Raises:
        ValueError: as of `quantizers.get`; the scheme's field is named where it is the options'
            fault.
    """
    try:
        return quantizers.get(name, role=role, **{**given, **options})
    except ValueError as error:
        if options:
            # Raises where bits or role are refused, whatever the options.
            quantizers.get(name, role=role, **given)
            raise ValueError(f"Scheme: {role}_options: {error}") from error
        raise


class Tensors:
    """The tensors of the new model by those of the float one, and ways to read them.

    Args:
        plan: the `Plan` of the float model.
        images: its `ImageGrids`.
        maker: the `LayerMaker` of the new model.

    Attributes:
        entries: `Entry` by index of the float model's tensor.
    """

    def __init__(self, plan, images, maker):
        self.plan, self.images, self.make = plan, images, maker
        self.scheme = plan.scheme
        self.entries: dict[int, Entry] = {}

    def on_grid(self, ref):
        """Whether a tensor sits on a grid; a stream is put on its own when first asked for."""
        entry = self.entries[ref.index]
        if entry.pair is None and self.plan.needs_stream(ref):
            quantized = self.quantized(ref, entry.values, STREAM_BITS)
            entry.pair, entry.bits, entry.values = quantized, STREAM_BITS, None
            entry.offset = self.images.offset_of(ref)
        return entry.pair is not None

    def values(self, ref):
        """The reals of a tensor."""
        entry = self.entries[ref.index]
        if self.on_grid(ref) and entry.values is None:
            entry.values = self.make.dequantized(entry.pair, self._name(ref), entry.offset)
        return entry.values

    def centred(self, ref):
        """An entry on a grid whose code 0 is 0.0: for what adds no offset of its own, or pads."""
        entry = self.entries[ref.index]
        if not (self.on_grid(ref) and entry.offset):
            return entry
        if entry.centred is None:
            _, lo, _ = self.images.grid(ref)
            entry.centred = self.recentred(ref, signed=lo < 0)
        return entry.centred

    def recentred(self, ref, signed):
        """A tensor on a symmetric 8-bit grid behind its own."""
        step = layers.Quantize(
            quantizers.get("lsq", bits=STREAM_BITS, signed=signed, role="activation"),
            name=self.make.name(f"{self._name(ref)}_centred_quantize"),
        )
        return Entry(pair=step(self.values(ref)), bits=STREAM_BITS)

    def centred_values(self, ref):
        """The reals of a tensor, from a grid whose code 0 is 0.0 where it is on one."""
        entry = self.centred(ref)
        if not (self.on_grid(ref) and self.entries[ref.index].offset):
            return self.values(ref)
        if entry.values is None:
            entry.values = self.make.dequantized(entry.pair, f"{self._name(ref)}_centred")
        return entry.values

    def grid(self, ref, bits):
        """The pair of a tensor on a grid of `bits`; images have 8, whatever is asked for."""
        entry = self.entries[ref.index]
        if self.plan.is_image(ref):
            bits = 8
        if self.on_grid(ref) and entry.bits == bits:
            return entry.pair
        if bits not in entry.made:
            entry.made[bits] = self.quantized(ref, self.values(ref), bits)
        return entry.made[bits]

    def logits(self, ref):
        """The reals of a tensor behind its 8-bit grid."""
        pair = self.grid(ref, STREAM_BITS)
        if self.entries[ref.index].offset:
            pair = self.centred(ref).pair
        return self.make.dequantized(pair, self._name(ref))

    def output(self, ref):
        """What the model gives for an output of the float model."""
        whole = "float" not in ref.dtype  # such as the classes of an argmax
        if (
            whole
            or self.plan.makes_probabilities(ref)
            or not (self.on_grid(ref) or any(map(_is_product, self.plan.ancestors(ref))))
        ):
            return self.values(ref)
        return self.logits(ref)

    def quantized(self, ref, values, bits, name=None, signed=None):
        """The pair of `values`, on the grid that the plan and the scheme say."""
        name = self.make.name(f"{name or self._name(ref)}_quantize")
        fixed = self.plan.fixed_scale(ref) if signed is None and bits == STREAM_BITS else None
        if self.plan.is_image(ref):
            quantizer = self.images.quantizer(ref)
        elif fixed is not None:
            quantizer = quantizers.Affine(bits, scale=fixed)
        else:
            nonnegative, limit = self.plan.sign_and_limit(ref)
            signed = not nonnegative if signed is None else signed
            method, options = self.scheme.activation_of(bits)
            if method == SIGN and not signed:
                raise ValueError(
                    f"{self._name(ref)}: nothing is negative behind a ReLU, so all signs "
                    "would be 1. Take the ReLU out of the float model (a batch norm in its place), "
                    "or use Scheme(binary_activation='heaviside')"
                )
            limited = {"max_value": limit} if method in _TAKE_A_LIMIT else {}
            given = {"bits": bits, "signed": signed, **limited}
            quantizer = quantizer_of("activation", method, options, **given)
        return layers.Quantize(quantizer, name=name)(values)

    def _name(self, ref):
        call = self.plan.producers.get(ref.index)
        return self.plan.program.input_name(ref) if call is None else call.name


def _is_product(call):
    return kind_of(call) == "product"
