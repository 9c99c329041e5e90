"""Blocks of a model: stretches between tensors that carry everything.

A tensor is a cut if all that is computed after it depends on what came before through it alone.
In the quantized model such a tensor lies in front of a grid, so it holds reals, and the float model
has the same tensor under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

from keras_lowbit import walk
from keras_lowbit.checks import did_you_mean
from keras_lowbit.kinds import activation_name, kind_of

# A stem and a bottleneck: chains are cut at linear tensors, or into stretches of as many products.
PRODUCTS = 4
# Calls that finish what the product before them began.
_JOINING = frozenset({"activation", "batch_norm", "add"})


@dataclass(frozen=True)
class Block:
    """The same stretch of both models.

    Args:
        name: the call whose output ends it.
        quantized: its part of the quantized model.
        floating: its part of the float model.
    """

    name: str
    quantized: walk.Program
    floating: walk.Program

    @property
    def products(self) -> int:
        """Layers with a kernel."""
        return _products(self.floating.calls)


def find(quantized: walk.Program, floating: walk.Program, names=None) -> list[Block]:
    """Blocks of two corresponding programs, in order.

    Without names: what lies between two cuts and has branches (a residual block) is a block; a
    chain is one up to its next linear tensor (the narrow end of a bottleneck), of `PRODUCTS`
    products at most. Activations and batch norms join the block before them, pools the next one.

    Args:
        quantized: the quantized model's program.
        floating: the float model's.
        names: layers whose outputs end a block; the last block ends with the model.

    Raises:
        ValueError: a name that is no cut.
    """
    cuts = _common_cuts(quantized, floating)
    if names is None:
        names = _grouped(floating, cuts)
    else:
        names = [walk.plain(str(name)) for name in names]
        for name in names:
            if name not in cuts:
                hint = did_you_mean(name, cuts)
                raise ValueError(
                    f"blocks: the output of {name!r} does not carry everything behind it, or no "
                    f"layer has that name. Cuts: {list(cuts)}.{hint}"
                )
        names = [name for name in cuts if name in set(names)]
    ends = [cuts[name] for name in names]
    halves = [
        _split(program, [end[side] for end in ends])
        for side, program in enumerate((quantized, floating))
    ]
    last = [floating.calls[-1].plain]
    return [Block(*parts) for parts in zip([*names, *last], *halves, strict=True)]


def _common_cuts(quantized, floating):
    """`{name: (end in the quantized program, end in the float one)}` of cuts that both have."""
    ours, theirs = _cuts(quantized), _cuts(floating)
    found, position = {}, -1
    for name, end in ours.items():
        other = theirs.get(name)
        if other is None or other <= position:
            continue
        first, second = quantized.calls[end], floating.calls[other]
        same = first.output.shape == second.output.shape
        if same and activation_name(first.operation) == activation_name(second.operation):
            found[name], position = (end, other), other
    return found


def _cuts(program):
    """`{plain name: position}` of calls after which only their output is still needed."""
    last = {ref.index: i for i, call in enumerate(program.calls) for ref in call.inputs}
    for ref in walk.refs(program.outputs):
        last[ref.index] = len(program.calls)
    alive = {ref.index for ref in program.inputs if ref.index in last}
    found = {}
    for i, call in enumerate(program.calls[:-1]):
        made = {ref.index for ref in walk.refs(call.outputs) if ref.index in last}
        alive = {index for index in alive | made if last[index] > i}
        if made == alive and len(walk.refs(call.outputs)) == 1:
            found[call.plain] = i
    return found


def _grouped(floating, cuts):
    """Names of the cuts that end a block."""
    starts = [0, *(end + 1 for _, end in cuts.values())]
    stops = [*starts[1:], len(floating.calls)]
    names, current, closed = [], 0, False
    previous, candidate, joining = None, None, False
    for start, stop, end in zip(starts, stops, [*cuts, None], strict=True):
        calls = floating.calls[start:stop]
        products, branched = _products(calls), _branches(calls)
        if products:
            full = current + products > PRODUCTS
            if current and (closed or branched or full or not _activated(previous)):
                names.append(candidate)
                current = 0
            current, closed, previous, joining = current + products, branched, calls, True
        else:
            previous = (*(previous or ()), *calls)
            joining = joining and all(kind_of(call) in _JOINING for call in calls)
        if joining:
            candidate = end
    return names


def _activated(calls):
    """Whether a non-linearity stands between the last product of `calls` and their end."""
    for call in reversed(calls):
        if kind_of(call) == "activation":
            return True
        if kind_of(call) == "product":
            return activation_name(call.operation) != "linear"
    return False


def _products(calls):
    return sum(kind_of(call) == "product" for call in calls)


def _branches(calls):
    """Whether a stretch between two cuts is more than a chain."""
    reads = [index for call in calls for index in {ref.index for ref in call.inputs}]
    return len(reads) != len(set(reads))


def _split(program, ends):
    """Programs between cuts, one after another."""
    parts, start, inputs, names = [], 0, program.inputs, program.input_names
    for end in ends:
        output = program.calls[end].output
        parts.append(walk.Program(program.calls[start : end + 1], inputs, names, output))
        start, inputs, names = end + 1, (output,), (program.calls[end].plain,)
    parts.append(walk.Program(program.calls[start:], inputs, names, program.outputs))
    return parts
