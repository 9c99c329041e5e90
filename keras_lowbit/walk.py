"""Reading a Keras model as a list of calls: the only file that knows Keras' graph internals.

Functional, Sequential and nested models come out as one flat list, in execution order, with
`keras.ops` calls (`ops.add`, `x[:, ::2]`, `ops.pad`) beside layer calls.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lowbit.numerics import backend


@dataclass(frozen=True)
class Ref:
    """A tensor of the flattened model: `index` is unique, `shape` has `None` for the batch."""

    index: int
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One call of a layer or operation.

    Args:
        operation: the Keras layer or operation object.
        name: its name, with those of the models around it in front (`backbone/conv1`).
        args: positional arguments with `Ref` in place of tensors.
        kwargs: keyword arguments likewise.
        outputs: the result's structure with `Ref`.
        plain: what a copy of the operation is called in a model without nested ones
            (`backbone_conv1`): a name of its own for each operation and input of the program.
    """

    operation: Any
    name: str
    args: tuple
    kwargs: Mapping[str, Any]
    outputs: Any
    plain: str = ""

    @property
    def inputs(self) -> list[Ref]:
        """Tensors that the call reads, in order."""
        return refs((self.args, dict(self.kwargs)))

    @property
    def output(self) -> Ref:
        """The single output; `ValueError` if there are several."""
        found = refs(self.outputs)
        if len(found) != 1:
            raise ValueError(f"{self.name}: expected one output. Got {len(found)}")
        return found[0]


@dataclass(frozen=True)
class Program:
    """A flattened model; `output_names` are those of `outputs`, flattened."""

    calls: tuple[Call, ...]
    inputs: tuple[Ref, ...]
    input_names: tuple[str, ...]
    outputs: Any
    output_names: tuple[str, ...] = ()

    def readers(self) -> dict[int, list[Call]]:
        """Calls that read each tensor, by the tensor's index; a call counts once."""
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            for index in dict.fromkeys(ref.index for ref in call.inputs):
                found.setdefault(index, []).append(call)
        return found

    def producers(self) -> dict[int, Call]:
        """The call that computes each tensor; model inputs have none."""
        return {ref.index: call for call in self.calls for ref in refs(call.outputs)}

    def times(self) -> Counter[int]:
        """How often each operation is called, by its identity; more than once is a shared layer."""
        return Counter(id(call.operation) for call in self.calls)

    def input_name(self, ref: Ref) -> str:
        """The name of the input that is a tensor."""
        return self.input_names[[known.index for known in self.inputs].index(ref.index)]

    def feeds(self, batch) -> list[Any]:
        """Tensors of the inputs' types, of arrays in the order of the inputs."""
        return [
            ops.convert_to_tensor(np.asarray(array).astype(ref.dtype))
            for array, ref in zip(batch, self.inputs, strict=True)
        ]


def refs(structure) -> list[Ref]:
    """All `Ref` in a nested structure."""
    return [leaf for leaf in keras.tree.flatten(structure) if isinstance(leaf, Ref)]


def substitute(structure, values: Mapping[int, Any]):
    """`structure` with every `Ref` replaced by its value."""
    return keras.tree.map_structure(
        lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf, structure
    )


def _functional(model):
    """The Functional graph of a model, or `None` for a plain layer."""
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ValueError(
                f"{model.name}: the Sequential model has no input shape yet. "
                "Add a keras.Input first, or call model.build(shape)."
            )
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def check_model(model) -> None:
    """Raise `ValueError` for what is no Keras model, such as the path of one."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a Keras model. Got {model!r:.80} ({type(model).__name__}); a file's model "
            "is keras.models.load_model(path)"
        )


def flatten(model: keras.Model) -> Program:
    """The calls of `model` in execution order, nested models opened.

    Raises:
        ValueError: no model, subclassed models (no graph to read) and unbuilt Sequential ones.
    """
    check_model(model)
    graph = _functional(model)
    if graph is None:
        raise ValueError(
            f"{model.name} ({type(model).__name__}) has no graph to read: only functional and "
            "Sequential models can be transformed. Build it with keras.Model(inputs, outputs)."
        )
    calls: list[Call] = []
    counter = iter(range(10**9))

    def fresh(tensor):
        return Ref(next(counter), tuple(tensor.shape), str(tensor.dtype))

    def visit(graph, known: dict[int, Ref], prefix: str):
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = (
                    _refer(node.arguments.args, known),
                    _refer(node.arguments.kwargs, known),
                )
                inner = _functional(node.operation)
                if inner is None:
                    made = keras.tree.map_structure(fresh, node.outputs)
                    calls.append(
                        Call(node.operation, prefix + node.operation.name, args, kwargs, made)
                    )
                else:
                    fed = _fed(inner, args, kwargs)
                    inside = {id(t): r for t, r in zip(inner.inputs, fed, strict=True)}
                    visit(inner, inside, f"{prefix}{node.operation.name}/")
                    made = [inside[id(t)] for t in inner.outputs]
                outs = keras.tree.flatten(node.outputs)
                for tensor, ref in zip(outs, refs(made), strict=True):
                    known[id(tensor)] = ref

    known = {id(t): fresh(t) for t in graph.inputs}
    inputs = tuple(known[id(t)] for t in graph.inputs)
    # A tensor that the user gave no name counts through the session; its layer has a plain one.
    layers = {
        id(tensor): node.operation.name
        for nodes in graph._nodes_by_depth.values()
        for node in nodes
        if node.is_input
        for tensor in node.output_tensors
    }
    names = tuple(layers[id(t)] for t in graph.inputs)
    visit(graph, known, "")
    outputs = keras.tree.map_structure(lambda t: known[id(t)], graph.output)
    return Program(_named(calls, names), inputs, names, outputs, tuple(graph.output_names))


def plain(name: str) -> str:
    """A name without what separates nested models and scopes, or what a backend's may not hold.

    TensorFlow refuses `:`, `<` and `>`. PyTorch refuses a dot in the path of a variable, which
    holds the names of its layers; on every backend it goes, so that all give the same names.
    """
    return re.sub("[/:<>.]", "_", name)


def unused(name: str, taken: Collection[str]) -> str:
    """`name`, or `name_2`, `name_3` and so on: the first that is not taken."""
    found, n = name, 1
    while found in taken:
        n += 1
        found = f"{name}_{n}"
    return found


def _named(calls, inputs) -> tuple[Call, ...]:
    """The calls with their plain names: `n/c` and `n_c` may meet in one model."""
    taken, own = set(inputs), {}
    for call in calls:
        if id(call.operation) not in own:
            own[id(call.operation)] = unused(plain(call.name), taken)
            taken.add(own[id(call.operation)])
    return tuple(dataclasses.replace(call, plain=own[id(call.operation)]) for call in calls)


def _fed(inner, args, kwargs) -> list[Ref]:
    """What a nested model is called with, in the order of its inputs."""
    given = args[0] if args else kwargs.get("inputs")
    if isinstance(given, dict) and not isinstance(inner.input, dict):
        # As Keras reads it: by the names of the inputs, not in the order of keys.
        return [given[tensor.name] for tensor in inner.inputs]
    return refs((args, kwargs))


def _refer(structure, known: Mapping[int, Ref]):
    return keras.tree.map_structure(
        lambda leaf: known[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf, structure
    )


def infer(call: Call, args: tuple, kwargs: dict):
    """A call in inference mode, for `run`.

    Outside of a model Keras' random augmentation is on by default, and its calls in a model
    remember that as if it had been asked for; all other layers are off.
    """
    operation = call.operation
    by_default = inspect.signature(operation.call).parameters.get("training")
    if by_default is not None and by_default.default is True:
        kwargs = {**kwargs, "training": False}
    return operation(*args, **kwargs)


def run(
    program: Program, feeds: Iterable[Any], execute: Callable[[Call, tuple, dict], Any]
) -> dict[int, Any]:
    """Interpret a program: `execute(call, args, kwargs)` for each call in order.

    A value is dropped after its last reader, so memory holds what a forward pass needs.

    Returns:
        Values of the program's outputs, by tensor index.
    """
    values = dict(zip((ref.index for ref in program.inputs), feeds, strict=True))
    kept = {ref.index for ref in refs(program.outputs)}
    last = {ref.index: i for i, call in enumerate(program.calls) for ref in call.inputs}
    for i, call in enumerate(program.calls):
        results = execute(
            call, substitute(call.args, values), substitute(dict(call.kwargs), values)
        )
        made = refs(call.outputs)
        flat = [results] if len(made) == 1 else keras.tree.flatten(results)
        for ref, value in zip(made, flat, strict=True):
            if ref.index in kept or ref.index in last:
                values[ref.index] = value
        for ref in call.inputs:
            if last[ref.index] == i and ref.index not in kept:
                values.pop(ref.index, None)
    return {index: values[index] for index in kept}


def forward(
    program: Program,
    feeds: Iterable[Any],
    execute: Callable[[Call, tuple, dict], Any] = infer,
) -> dict[int, Any]:
    """`run` where nobody will ask for a gradient."""
    with backend.without_gradients():
        return run(program, feeds, execute)
