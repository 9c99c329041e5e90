"""Reference, runtime and Keras side by side: how many codes differ, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from tflite_export import runtime

EVERY_TENSOR = "reference and LiteRT, every tensor"
OUTPUTS = "reference and LiteRT, outputs of the file as shipped"
KERAS = "reference and Keras"

_CHUNK = 8  # images in flight; bounds memory, since every tensor of each is kept


@dataclass(frozen=True)
class Count:
    """Codes compared, how many of them differ, and the largest difference in LSB."""

    wrong: int = 0
    compared: int = 0
    max_lsb: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.wrong + other.wrong,
            self.compared + other.compared,
            max(self.max_lsb, other.max_lsb),
        )

    def __iter__(self):
        return iter(dataclasses.astuple(self))


@dataclass(frozen=True)
class Verification:
    """What was compared with the reference, and what differed.

    Args:
        counts: `Count` by (comparison, tensor name); comparisons are `EVERY_TENSOR`, `OUTPUTS`
            and, where a Keras model was given, `KERAS`.
        images: how many samples ran.
    """

    counts: Mapping[tuple[str, str], Count]
    images: int

    @property
    def wrong(self) -> int:
        """Codes that differ, over all comparisons."""
        return sum(count.wrong for count in self.counts.values())

    @property
    def compared(self) -> int:
        """Codes compared, over all comparisons."""
        return sum(count.compared for count in self.counts.values())

    @property
    def by_tensor(self) -> dict[str, Count]:
        """Name -> (wrong, compared, max_lsb), over all comparisons, in execution order."""
        return self._summed(1)

    @property
    def by_comparison(self) -> dict[str, Count]:
        """Comparison -> (wrong, compared, max_lsb), over all tensors."""
        return self._summed(0)

    def _summed(self, part):
        sums: dict[str, Count] = {}
        for key, count in self.counts.items():
            sums[key[part]] = sums.get(key[part], Count()) + count
        return sums

    def __str__(self) -> str:
        lines = [
            f"{count.wrong:,} wrong of {count.compared:,} codes: {name}, {self.images} images"
            for name, count in self.by_comparison.items()
        ]
        lines += [
            f"  {name}: {count.wrong:,} of {count.compared:,}, at most {count.max_lsb:g} LSB"
            for name, count in self.by_tensor.items()
            if count.wrong
        ]
        return "\n".join(lines)


def verify(
    graph: ir.Graph,
    content: bytes,
    images: np.ndarray | Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray] | None = None,
) -> Verification:
    """Compare a file with the graph that it was written from, code for code.

    Every computed tensor is read from a copy of `content` that lists all of them as outputs; the
    outputs are read once more from `content` itself, in case the copy runs otherwise.

    Args:
        graph: the integer graph.
        content: bytes of the `.tflite` file.
        images: inputs of any number of samples, in the dtype of the graph's input: an array, or
            arrays by name where there are several inputs.
        frozen: codes by tensor name that a Keras model computed for the same images; any
            selection of the graph's tensors.

    Raises:
        ValueError: for images that do not fit the graph, frozen tensors that it does not have or
            of another shape, or a file that the runtime refuses.
        ImportError: without the `tflite` extra.
    """
    from tflite_export import flatbuffer  # at its use: only files need the `tflite` extra

    inputs = _named_inputs(graph, images)
    count = len(next(iter(inputs.values())))
    batch = graph.tensors[graph.inputs[0]].shape[0]
    if count % batch:
        raise ValueError(f"A file of batch {batch} takes that many images at a time. Got {count}")
    frozen = _checked_frozen(graph, frozen or {}, count)
    shipped = runtime.Session(content)  # first: it refuses a damaged file in words
    copy = runtime.Session(flatbuffer.with_all_outputs(content))
    _check_interface(graph, copy, shipped)

    step = batch * max(1, _CHUNK // batch)
    counts: dict[tuple[str, str], Count] = {}
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        part = {name: array[chunk] for name, array in inputs.items()}
        expected = reference.run(graph, part)
        for label, actual in (
            (EVERY_TENSOR, copy.run(part)),
            (OUTPUTS, shipped.run(part)),
            (KERAS, {name: codes[chunk] for name, codes in frozen.items()}),
        ):
            for name in (name for name in expected if name in actual):
                difference = _difference(graph, name, expected[name], actual[name])
                counts[label, name] = counts.get((label, name), Count()) + difference
    return Verification(counts, count)


def _difference(graph, name, expected, actual):
    # float64 holds codes and float32 values exactly.
    lsb = np.abs(expected.astype(np.float64) - np.asarray(actual, np.float64)) / _unit(graph, name)
    lsb = np.nan_to_num(lsb, nan=np.inf, posinf=np.inf)
    return Count(int(np.count_nonzero(lsb)), lsb.size, float(lsb.max(initial=0)))


def _unit(graph, name):
    """One LSB: a code, or for de-quantized reals the scale that they came from."""
    for op in graph:
        if op.output == name and isinstance(op, ir.Dequantize):
            return graph.tensors[op.inputs[0]].scale
    return 1


def _named_inputs(graph, images):
    if not isinstance(images, Mapping):
        if len(graph.inputs) != 1:
            raise ValueError(f"The graph's inputs are {list(graph.inputs)}: give arrays by name.")
        images = {graph.inputs[0]: images}
    inputs = reference.checked_inputs(graph, images)
    if not len(next(iter(inputs.values()))):
        raise ValueError("No images to verify with; give at least one.")
    return inputs


def _checked_frozen(graph, frozen, count):
    arrays = {name: np.asarray(codes) for name, codes in frozen.items()}
    for name, array in arrays.items():
        if name not in graph.tensors:
            raise ValueError(f"The graph has no tensor {name}; it has {list(graph.tensors)}")
        expected = (count, *graph.tensors[name].shape[1:])
        if array.shape != expected:
            raise ValueError(f"Frozen tensor {name} must have shape {expected}. Got {array.shape}")
    return arrays


def _check_interface(graph, copy, shipped):
    """A file of another graph would otherwise pass by having no tensor in common."""
    expected = {op.output for op in graph}
    # An operation that the writer writes as several names what lies between after its output.
    computed = {n for n in copy.outputs if n in expected or n.rpartition("/")[0] not in expected}
    if computed != expected or set(shipped.outputs) != set(graph.outputs):
        odd = sorted(expected ^ computed) or sorted(set(shipped.outputs))
        raise ValueError(f"The file was not written from this graph: they differ in {odd[:5]}")
