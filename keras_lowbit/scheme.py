"""Schemes: how many bits go where, from a short string or a mapping."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_lowbit.checks import did_you_mean
from keras_lowbit.numerics.grid import MAGNITUDE_BITS, checked_width

_SHORT = re.compile(r"w(?P<kernel>\d+|t)a(?P<activation>\d+)")
TERNARY, TERNARY_BITS = "ternary", 2
SIGN = "sign"
FLOAT = "float"
BINARY_ACTIVATIONS = ("heaviside", SIGN)
# Quantizers of few levels; layers that keep 8 bits beside them take this one.
_LEVELS = "levels"
_FEW_LEVELS, _BESIDE = (TERNARY, _LEVELS), "lsq"
# Arguments of quantizers that a scheme gives itself.
DECIDED = ("bits", "role", "axis", "signed", "target_bits")
# Bits that a kernel's quantizer takes, where fewer than 8: DoReFa's are those of a magnitude.
_LARGEST = {"dorefa": MAGNITUDE_BITS}


@dataclass(frozen=True)
class Widths:
    """Bits of one layer's kernel and input.

    Args:
        kernel_bits: width of the kernel's codes, 1..8.
        activation_bits: width of the input's codes, 1..8.
        kernel: quantizer of the kernel; `None` for the scheme's.
    """

    kernel_bits: int
    activation_bits: int
    kernel: str | None = None

    def __post_init__(self):
        for name in ("kernel_bits", "activation_bits"):
            object.__setattr__(self, name, checked_width(getattr(self, name), who=name))

    @classmethod
    def parse(cls, text: str) -> Widths:
        """`"w4a8"` -> kernels at 4 bits, activations at 8; `"wta8"` -> ternary kernels."""
        if not isinstance(text, str):
            raise ValueError(
                f"Bits of a layer are a string such as 'w4a8', or {FLOAT!r}. Got {text!r}"
            )
        match = _SHORT.fullmatch(text.strip().lower())
        if not match:
            known = [f"w{w}a{a}" for w in (8, 6, 4, 3, 2, 1, "t") for a in (8, 6, 4, 3, 2, 1)]
            # Where only one width is given, it is of both.
            hint = did_you_mean(re.sub(r"^w(\d)$", r"w\1a\1", text.lower()), known)
            raise ValueError(
                f"Unknown scheme {text!r}: expected w<bits>a<bits> with 1 to 8 bits, "
                f"such as 'w4a8', or 'wta8' for ternary kernels.{hint}"
            )
        if match["kernel"] == "t":
            return cls(TERNARY_BITS, int(match["activation"]), TERNARY)
        return cls(int(match["kernel"]), int(match["activation"]))


@dataclass(frozen=True)
class Scheme:
    """Which quantizer and how many bits go where.

    Args:
        kernel_bits: width of kernels' codes, 1..8; with `kernel="ternary"` always 2.
        activation_bits: width of the codes that quantized layers read, 1..8.
        kernel: quantizer of kernels, a name. Beside `"ternary"` and `"levels"` the ends, and
            layers whose exception names bits that they do not have, take `"lsq"`; so do 8-bit
            kernels beside `"dorefa"`, which takes 7 at most.
        activation: quantizer of activations, a name.
        per_channel: one kernel scale for each output channel (one for the kernel if False).
        ends_bits: width of the first and last layers' kernels and inputs; `None` treats them
            like the others, `"float"` leaves them float, as many papers do: such a model trains
            and answers, but no integer file holds it.
        exceptions: layer-name pattern (`*` and `?` as in a shell) to `"w8a8"`, or to `"float"` or
            `None` for a layer that stays float. The last pattern that matches wins.
        kernel_options: more arguments of the quantizers that `kernel` names, such as
            `{"gradient": "sigmoid"}`.
        activation_options: likewise for `activation`.
        binary_activation: what 1-bit activations are: `"heaviside"`, codes 0 and 1 of
            `activation`, or `"sign"`, -1 and 1 (`quantizers.Sign`), for tensors with negative
            values.

    Raises:
        ValueError: bits out of range, an unknown key or a malformed string.
    """

    kernel_bits: int = 8
    activation_bits: int = 8
    kernel: str = "lsq"
    activation: str = "lsq"
    per_channel: bool = True
    ends_bits: int | str | None = 8
    exceptions: Mapping[str, str | None] = field(default_factory=dict)
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    binary_activation: str = "heaviside"

    def __post_init__(self):
        for name in ("kernel", "activation"):
            given = getattr(self, name)
            if not isinstance(given, str):
                raise ValueError(
                    f"Scheme: {name} is the name of a quantizer, such as 'lsq'. Got {given!r}"
                )
            # As in the registry, which takes names in any case.
            object.__setattr__(self, name, given.lower())
        if self.kernel == TERNARY:
            if self.kernel_bits not in (TERNARY_BITS, Scheme.kernel_bits):
                raise ValueError(
                    f"Scheme: ternary codes take {TERNARY_BITS} bits. Got "
                    f"kernel_bits={self.kernel_bits!r}; leave it out"
                )
            object.__setattr__(self, "kernel_bits", TERNARY_BITS)
        for name in ("kernel_bits", "activation_bits"):
            checked_width(getattr(self, name), who=f"Scheme: {name}")
        if isinstance(self.ends_bits, str) and self.ends_bits != FLOAT:
            raise ValueError(
                f"Scheme: ends_bits is a width from 1 to 8, None or {FLOAT!r}. "
                f"Got {self.ends_bits!r}"
            )
        if self.ends_bits not in (None, FLOAT):
            checked_width(self.ends_bits, who="Scheme: ends_bits")
        for name in ("exceptions", "kernel_options", "activation_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"Scheme: {name} is a mapping. Got {getattr(self, name)!r}")
            odd = [key for key in getattr(self, name) if not isinstance(key, str)]
            if odd:
                raise ValueError(f"Scheme: names in {name} are strings. Got {odd[0]!r}")
            own = [key for key in DECIDED if name != "exceptions" and key in getattr(self, name)]
            if own:
                raise ValueError(
                    f"Scheme: {own[0]} follows from the scheme; leave it out of {name}"
                )
        # Files have no `None`, and beside `ends_bits` the word is the same.
        named = {k: None if v == FLOAT else v for k, v in self.exceptions.items()}
        object.__setattr__(self, "exceptions", named)
        for pattern, widths in named.items():
            if widths is not None:
                _parsed(pattern, widths)
        self._check_binary_activation()

    def _check_binary_activation(self):
        if self.binary_activation not in BINARY_ACTIVATIONS:
            raise ValueError(
                f"Scheme: binary_activation must be one of {BINARY_ACTIVATIONS}. "
                f"Got {self.binary_activation!r}"
            )
        if self.activation == SIGN:
            raise ValueError(
                "Scheme: signs are for 1-bit activations only, and the ends and sums of a model "
                "have 8 bits. Leave activation out, and give activation_bits=1 and "
                "binary_activation='sign'"
            )
        named = [Widths.parse(w).activation_bits for w in self.exceptions.values() if w is not None]
        if self.binary_activation == SIGN and 1 not in (self.activation_bits, *named):
            raise ValueError(
                "Scheme: binary_activation='sign' needs activations of 1 bit. Got "
                f"activation_bits={self.activation_bits}; take 'w1a1', or leave it out"
            )

    @classmethod
    def of(cls, given) -> Scheme:
        """A scheme from a `Scheme`, a string, or a mapping.

        A mapping holds either fields of this class or layer-name patterns; the pattern `"*"`
        gives the scheme of all layers that no other pattern names.
        """
        if isinstance(given, Scheme):
            return given
        if isinstance(given, str):
            widths = Widths.parse(given)
            named = {} if widths.kernel is None else {"kernel": widths.kernel}
            return cls(widths.kernel_bits, widths.activation_bits, **named)
        if not isinstance(given, Mapping):
            raise ValueError(
                "A scheme is a string such as 'w4a4', a Scheme, or a mapping by layer-name "
                f"pattern. Got {given!r}"
            )
        fields = [f.name for f in dataclasses.fields(cls)]
        odd = [key for key, v in given.items() if key != "*" and not isinstance(v, str | None)]
        misspelt = any(did_you_mean(key, fields) for key in odd)
        if misspelt or any(key in fields for key in given):
            return cls._from_fields(given, fields)
        rest = {key: value for key, value in given.items() if key != "*"}
        base = cls.of(given.get("*", "w8a8"))
        return dataclasses.replace(base, exceptions={**base.exceptions, **rest})

    @classmethod
    def _from_fields(cls, given, fields):
        for key in given:
            if key not in fields:
                hint = did_you_mean(key, fields)
                raise ValueError(f"Scheme: unknown key {key!r}; expected one of {fields}.{hint}")
        return cls(**given)

    def widths(self, layer_name: str, *, is_end: bool) -> Widths | None:
        """Bits of a layer, or `None` where it stays float."""
        chosen: Widths | None = Widths(self.kernel_bits, self.activation_bits)
        if is_end and self.ends_bits == FLOAT:
            chosen = None
        elif is_end and self.ends_bits is not None:
            chosen = self._beside(Widths(self.ends_bits, self.ends_bits))
        for pattern, widths in self.exceptions.items():
            if fnmatch.fnmatchcase(layer_name, pattern):
                chosen = None if widths is None else Widths.parse(widths)
                # Exceptions keep learned levels, which take any number of them.
                if chosen is not None and chosen.kernel is None and self.kernel != _LEVELS:
                    chosen = self._beside(chosen)
        return chosen

    def _beside(self, widths):
        """The widths of an odd layer, with a quantizer that takes so many bits."""
        largest = _LARGEST.get(self.kernel, 8)
        few = self.kernel in _FEW_LEVELS or widths.kernel_bits > largest
        return dataclasses.replace(widths, kernel=_BESIDE) if few else widths

    def activation_of(self, bits: int) -> tuple[str, Mapping[str, Any]]:
        """Name and options of the quantizer of activations at `bits`."""
        if bits == 1 and self.binary_activation == SIGN:
            return SIGN, {}
        return self.activation, self.activation_options

    def unused_exceptions(self, layer_names) -> list[str]:
        """Patterns that match none of `layer_names`."""
        return [
            p for p in self.exceptions if not any(fnmatch.fnmatchcase(n, p) for n in layer_names)
        ]


def _parsed(pattern, text):
    try:
        return Widths.parse(text)
    except ValueError as error:
        raise ValueError(f"Scheme: exceptions[{pattern!r}]: {error}") from error
