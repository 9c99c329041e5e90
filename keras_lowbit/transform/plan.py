"""Which tensors of a float model get a grid, and of how many bits.

A grid belongs to a tensor. A tensor whose readers all ask for the same width gets one grid of that
width; one that is added, pooled, normalized, or read at two widths is a *stream*: it sits on an
8-bit grid, and a reader with fewer bits re-quantizes it.
"""

from __future__ import annotations

import functools

from keras_lowbit import walk
from keras_lowbit.kinds import TRANSPARENT, activation_name, kind_of

STREAM_BITS = 8
# What may stand between an input and the grid of its pixels, a Rescaling aside.
BEFORE_GRID = TRANSPARENT | {"augmentation"}
_STREAM_READERS = frozenset({"add", "average_pool", "global_average_pool"})


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
            return not all(self._passes_image(c) for c in self.readers.get(ref.index, []))
        wants = {self._want(c, ref) for c in self.readers.get(ref.index, [])}
        if ref in self.output_refs:
            wants.add(STREAM_BITS)
        count = len(self.readers.get(ref.index, [])) + (ref in self.output_refs)
        if "stream" in wants or len(wants) > 1 or (wants == {"pass"} and count > 1):
            return True
        # A sum sits on 8 bits before anything but its own activation touches it.
        return bool(wants) and self._root_is_add(ref) and not self._is_activated(ref)

    def _is_activated(self, ref):
        readers = self.readers.get(ref.index, [])
        return [kind_of(c) for c in readers] == ["activation"]

    def _want(self, call, ref):
        kind = kind_of(call)
        if kind == "product":
            widths = self.widths(call)
            return "pass" if widths is None else widths.activation_bits
        if kind in _STREAM_READERS:
            return "stream"
        if kind == "batch_norm" and not self._follows_product(ref):
            return "stream"
        if self.makes_probabilities(call):
            return STREAM_BITS
        return "pass"

    def makes_probabilities(self, call):
        """Whether a call is a softmax, or a sigmoid that ends the model: it reads 8-bit logits."""
        if kind_of(call) != "activation":
            return False
        name = activation_name(call.operation)
        return "softmax" in name or (name == "sigmoid" and call.output in self.output_refs)

    def walk_back(self, ref, kinds):
        """The first producer behind `ref` whose kind is not in `kinds`; `None` at an input."""
        call = self.producers.get(ref.index)
        while call is not None and kind_of(call) in kinds:
            call = self.producers.get(call.inputs[0].index)
        return call

    def _follows_product(self, ref):
        call = self.walk_back(ref, {"batch_norm", "dropout"})
        single = len(self.readers.get(ref.index, [])) == 1
        return (
            call is not None
            and single
            and kind_of(call) == "product"
            and self.widths(call) is not None
            and activation_name(call.operation) == "linear"
        )

    def _root_is_add(self, ref):
        call = self.walk_back(ref, {"activation"})
        return call is not None and kind_of(call) == "add"

    def is_image(self, ref):
        """Whether `ref` is a model input, moved about or rescaled by one number at most."""
        return self.walk_back(ref, BEFORE_GRID | {"rescaling"}) is None

    @staticmethod
    def _passes_image(call):
        return kind_of(call) in ("rescaling", "augmentation")

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
        found, stack = set(), [ref]
        while stack:
            call = self.producers.get(stack.pop().index)
            if call is None:
                continue
            if kind_of(call) == "product":
                found.add(call.name)
            else:
                stack.extend(call.inputs)
        return found

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
            return name in ("relu", "relu6", "softmax", "sigmoid"), 6.0 if name == "relu6" else None
        if kind in BEFORE_GRID | {"average_pool", "global_average_pool"}:
            return self.sign_and_limit(call.inputs[0])
        if kind in ("add", "concatenate"):
            known = [self.sign_and_limit(r) for r in call.inputs]
            limits = [limit for _, limit in known]
            common = kind == "concatenate" and len(set(limits)) == 1
            return all(sign for sign, _ in known), limits[0] if common else None
        return False, None
