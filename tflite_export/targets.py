"""What each target takes, and the sentence with which it refuses the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from keras_lowbit.integer import graph as ir


@dataclass(frozen=True)
class Target:
    """A place where files run.

    Args:
        name: as given to `convert`.
        runtime: the runtime whose kernels the file is written for.
        objections: sentences against an operation; empty where it is fine.
    """

    name: str
    runtime: str
    objections: Callable[[ir.Op], list[str]]


def _none(op: ir.Op) -> list[str]:
    return []


def _old_builtin(op: ir.Op) -> list[str]:
    if isinstance(op, ir.FullyConnected) and op.storage == "int4":
        return ["tflite-runtime 2.14 loads no int4 FULLY_CONNECTED; use weights='int8'"]
    return []


TARGETS = {
    "android": Target("android", "LiteRT 2, default kernels (XNNPACK)", _none),
    "builtin": Target("builtin", "tflite-runtime 2.14 and newer, built-in kernels", _old_builtin),
}


def find(name: str) -> Target:
    """The target of a name; `ValueError` with the nearest one otherwise."""
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(str(name), TARGETS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown target {name!r}; known: {sorted(TARGETS)}.{hint}")


def objections(graph: ir.Graph, target: Target) -> list[str]:
    """Every objection of a target to a graph, with the layer's name."""
    return [f"{op.source} ({op.kind}): {why}" for op in graph for why in target.objections(op)]
