"""Which tensors of a float model get a grid, and of how many bits.

A grid belongs to a tensor. A tensor whose readers all ask for the same width gets one grid of that
width; one that is added, pooled, normalized, or read at two widths is a *stream*: it sits on an
8-bit grid, and a reader with fewer bits re-quantizes it.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from keras_lowbit import walk
from keras_lowbit.kinds import (
    CLIPS,
    FIXED_SCALES,
    OF_TWO_TENSORS,
    TRANSPARENT,
    activation_name,
    kind_of,
    limit_of,
    scaling_of,
    walk_back,
    windows_of,
)
from keras_lowbit.numerics.windows import reaches_over

STREAM_BITS = 8
# What may stand between an input and the grid of its pixels, a Rescaling aside.
BEFORE_GRID = TRANSPARENT | {"augmentation"}
# Calls that leave an image one.
OF_IMAGES = BEFORE_GRID | {"rescaling"}
# Calls that scale and shift channels.
_MELTING = frozenset({"batch_norm", "rescaling"})
_STREAM_READERS = frozenset({"add", "multiply", "average_pool", "global_average_pool"})
# Activations that read 8-bit logits, and make 8-bit codes by a table.
_TABLES = ("softmax", "softmax_variant", "sigmoid")


class Plan:
    """Answers about the tensors of a float model under a scheme."""

    def __init__(self, program, scheme):
        self.program = program
        self.scheme = scheme
        self.readers = program.readers()
        self.producers = program.producers()
        self.output_refs = walk.refs(program.outputs)

    def needs_stream(self, ref):
        """Whether a tensor sits on an 8-bit grid of its own, whatever its readers want."""
        if self.is_image(ref):
            readers = self.readers.get(ref.index, [])
            return any(not self._passes_image(c) and self._meets_a_grid(c) for c in readers)
        wants = {self._want(c, ref) for c in self.readers.get(ref.index, [])}
        if ref in self.output_refs:
            wants.add(STREAM_BITS)
        count = len(self.readers.get(ref.index, [])) + (ref in self.output_refs)
        if "stream" in wants or len(wants) > 1 or (wants == {"pass"} and count > 1):
            return True
        if self.readers.get(ref.index) and self._makes_codes(ref):
            return True
        # A sum sits on 8 bits before anything but its own activation touches it.
        return bool(wants) and self._root_is_sum(ref) and not self._is_activated(ref)

    def makes_probabilities(self, ref):
        """Whether a tensor comes from a softmax or a sigmoid, a layer's own included."""
        return self._activation_of(self.producers.get(ref.index)) in _TABLES

    def _makes_codes(self, ref):
        """Whether an activation gives a tensor 8-bit codes: by a table, or of two tensors."""
        return self._activation_of(self.producers.get(ref.index)) in (*_TABLES, *OF_TWO_TENSORS)

    @staticmethod
    def _activation_of(call):
        """The activation that a call is, or ends with; `None` for other calls."""
        known = call is not None and kind_of(call) in ("activation", "product")
        return activation_name(call.operation) if known else None

    def _is_activated(self, ref):
        readers = self.readers.get(ref.index, [])
        # Another limit may be a small part of what is added, which the runtime would not add.
        return len(readers) == 1 and self._is_clip(readers[0], "linear", "relu", "relu6")

    def _want(self, call, ref):
        kind = kind_of(call)
        if kind == "product":
            widths = self.widths(call)
            return "pass" if widths is None else widths.activation_bits
        if kind in _STREAM_READERS:
            return "stream"
        if self.reads_logits(call):
            return STREAM_BITS
        if self.takes_two_tensors(call):
            return "stream"
        if kind in _MELTING or self._is_clip(call, "hard_sigmoid"):
            return "pass" if self._melts(call, ref) else "stream"
        return "pass"

    @staticmethod
    def reads_logits(call):
        """Whether a call is a softmax or a sigmoid, whose table takes 8-bit codes."""
        return kind_of(call) == "activation" and activation_name(call.operation) in _TABLES

    @staticmethod
    def reaches_over_border(call):
        """Whether a call is an average pool whose windows do, so that the runtime rounds it."""
        if kind_of(call) != "average_pool":
            return False
        operation, sizes = call.operation, call.inputs[0].shape[1:3]
        if operation.padding != "same" or operation.data_format == "channels_first":
            return False
        return None not in sizes and any(map(reaches_over, sizes, *windows_of(operation)))

    @staticmethod
    def takes_two_tensors(call):
        """Whether a call is an activation that becomes two tensors, multiplied or added."""
        return kind_of(call) == "activation" and activation_name(call.operation) in OF_TWO_TENSORS

    @staticmethod
    def _is_clip(call, *names):
        """Whether a call is an activation that clips, of these names or any."""
        known = kind_of(call) == "activation"
        return known and activation_name(call.operation) in (names or CLIPS)

    @staticmethod
    def _is_factor(call):
        """Whether a rescaling multiplies by one positive number and does nothing else."""
        gain, shift = scaling_of(call)
        return np.ndim(gain) == 0 and bool(gain > 0) and not np.any(shift)

    def _melts(self, call, ref):
        """Whether what a call does to `ref` becomes part of a product in front, its only reader.

        A positive factor may as well come before a clip; what adds something may not.
        """
        if len(self.readers.get(ref.index, [])) != 1:
            return False
        factor = kind_of(call) == "rescaling" and self._is_factor(call)
        before = self.producers.get(ref.index)
        while before is not None and (
            kind_of(before) in _MELTING | {"dropout"} or (factor and self._is_clip(before))
        ):
            before = self.producers.get(before.inputs[0].index)
        return (
            before is not None
            and kind_of(before) == "product"
            and self.widths(before) is not None
            and activation_name(before.operation) in (CLIPS if factor else ("linear",))
        )

    def walk_back(self, ref, kinds):
        """The first producer behind `ref` whose kind is not in `kinds`; `None` at an input."""
        return walk_back(self.producers, ref, kinds)

    def _root_is_sum(self, ref):
        call = self.walk_back(ref, {"activation"})
        return call is not None and kind_of(call) in ("add", "multiply")

    def is_image(self, ref):
        """Whether `ref` is a model input, moved about or rescaled by one number at most."""
        return self.walk_back(ref, OF_IMAGES) is None

    @staticmethod
    def _passes_image(call):
        return kind_of(call) in ("rescaling", "augmentation")

    def _meets_a_grid(self, call):
        """Whether a reader of an image, or what reads its moved values, can work on a grid.

        An `Embedding` cannot: on 8 bits its indices would be others.
        """
        kind = kind_of(call)
        if kind not in OF_IMAGES:
            return kind is not None
        return any(self._meets_a_grid(c) for c in self.readers.get(call.output.index, []))

    def input_of(self, ref):
        """The name of the model input that an image comes from."""
        call = self.producers.get(ref.index)
        while call is not None:
            ref = call.inputs[0]
            call = self.producers.get(ref.index)
        return self.program.input_name(ref)

    def ancestors(self, ref):
        """Every call that a tensor depends on."""
        seen, stack = set(), [ref]
        while stack:
            call = self.producers.get(stack.pop().index)
            if call is not None and id(call) not in seen:
                seen.add(id(call))
                yield call
                stack.extend(call.inputs)

    def widths(self, call):
        """Bits of a product's kernel and input, or `None` where it stays float."""
        return self.scheme.widths(call.name, is_end=call.name in self._ends)

    @functools.cached_property
    def _ends(self):
        first = {
            c.name
            for c in self.program.calls
            if kind_of(c) == "product"
            and not any(kind_of(a) == "product" for a in self.ancestors(c.inputs[0]))
        }
        last = set()
        for ref in self.output_refs:
            last |= self._nearest_products(ref)
        return first | last

    def _nearest_products(self, ref):
        """Products that a tensor is made of; of a chain of sums only those of the last."""
        found, stack = set(), [(ref, False)]
        while stack:
            last, summed = stack.pop()
            call = self.producers.get(last.index)
            if call is None:
                continue
            kind = kind_of(call)
            if kind == "product":
                found.add(call.name)
            elif kind != "add" or not summed:
                # A backbone ends in a residual sum, whose skips lead through all the others.
                stack.extend((source, summed or kind == "add") for source in call.inputs)
        return found

    def fixed_scale(self, ref):
        """Reals per code of a tensor whose 8-bit grid follows from its activation, or `None`."""
        return FIXED_SCALES.get(self._activation_of(self.walk_back(ref, TRANSPARENT)))

    def sign_and_limit(self, ref):
        """Whether a tensor has no negative values, and the largest it can take (or `None`)."""
        call = self.producers.get(ref.index)
        if call is None:
            return False, None
        kind = kind_of(call)
        if kind in ("activation", "product"):
            name = activation_name(call.operation)
            if name == "linear" and kind == "activation":
                return self.sign_and_limit(call.inputs[0])
            limit = limit_of(call.operation)
            nonnegative = limit is not None or name in FIXED_SCALES
            return nonnegative, None if limit == math.inf else limit
        if kind == "rescaling" and self._is_factor(call):
            nonnegative, limit = self.sign_and_limit(call.inputs[0])
            return nonnegative, None if limit is None else limit * float(scaling_of(call)[0])
        if kind in BEFORE_GRID | {"average_pool", "global_average_pool"}:
            return self.sign_and_limit(call.inputs[0])
        if kind in ("add", "multiply", "concatenate"):
            known = [self.sign_and_limit(r) for r in call.inputs]
            limits = [limit for _, limit in known]
            common = kind == "concatenate" and len(set(limits)) == 1
            return all(sign for sign, _ in known), limits[0] if common else None
        return False, None
