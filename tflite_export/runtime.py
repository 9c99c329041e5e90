"""Files in LiteRT's interpreter: what they compute, in which kernels, and how fast."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping

import numpy as np

XNNPACK = "XNNPACK"
BUILT_IN = "built-in"
_DELEGATE_NODE = "DELEGATE"
_EXTRA = ("flatbuffers", "ai_edge_litert.schema_py_generated", "ai_edge_litert.interpreter")


def require(module: str):
    """Import a module of the `tflite` extra.

    Raises:
        ImportError: naming the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"tflite_export needs {module}: pip install keras-lowbit[tflite]"
        ) from error


def require_extra() -> None:
    """See that files can be written and run here.

    Raises:
        ImportError: naming the command that installs what is missing.
    """
    for module in _EXTRA:
        require(module)


def open_interpreter(content: bytes, *, threads: int = 1, builtin_kernels: bool = False):
    """An interpreter with its tensors allocated.

    Args:
        content: bytes of a `.tflite` file.
        threads: threads that kernels may use.
        builtin_kernels: keep XNNPACK out.

    Raises:
        ImportError: if LiteRT is not installed.
        ValueError: if the runtime refuses the file.
    """
    litert = require("ai_edge_litert.interpreter")
    kinds = litert.OpResolverType
    kind = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES if builtin_kernels else kinds.AUTO
    try:
        interpreter = litert.Interpreter(
            model_content=bytes(content),
            num_threads=threads,
            experimental_op_resolver_type=kind,
        )
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"LiteRT refuses this file: {error}") from error
    return interpreter


class Session:
    """A file in the interpreter, ready to run any number of batches.

    Args:
        content: bytes of a `.tflite` file.
        threads: threads that kernels may use.
        builtin_kernels: keep XNNPACK out.

    Raises:
        ImportError: if LiteRT is not installed.
        ValueError: if the runtime refuses the file.
    """

    def __init__(self, content: bytes, *, threads: int = 1, builtin_kernels: bool = False):
        self._interpreter = open_interpreter(
            content, threads=threads, builtin_kernels=builtin_kernels
        )
        self._inputs = {d["name"]: d for d in self._interpreter.get_input_details()}
        self._outputs = {d["name"]: d for d in self._interpreter.get_output_details()}

    @property
    def inputs(self) -> dict[str, np.dtype]:
        """Names and types of the file's inputs."""
        return {name: np.dtype(detail["dtype"]) for name, detail in self._inputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the file's outputs."""
        return tuple(self._outputs)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the file's inputs by name, its own batch in front."""
        return _shapes(self._inputs)

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Likewise of its outputs."""
        return _shapes(self._outputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by tensor name; see `run`."""
        if set(self._inputs) != set(inputs):
            raise ValueError(f"The file's inputs are {list(self._inputs)}. Got {list(inputs)}")
        arrays = {name: np.asarray(inputs[name]) for name in self._inputs}
        batch, batches = _batches(self._inputs, arrays)
        collected = {name: [] for name in self._outputs}
        for start in range(0, batches * batch, batch):
            for name, array in arrays.items():
                self._interpreter.set_tensor(
                    self._inputs[name]["index"], array[start : start + batch]
                )
            self._interpreter.invoke()
            for name, detail in self._outputs.items():
                collected[name].append(self._interpreter.get_tensor(detail["index"]))
        return {name: np.concatenate(parts) for name, parts in collected.items()}


def run(
    content: bytes,
    inputs: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    builtin_kernels: bool = False,
) -> dict[str, np.ndarray]:
    """Outputs of a file by tensor name.

    Args:
        content: bytes of a `.tflite` file.
        inputs: arrays by input tensor name, in the input's dtype. The first axis may hold any
            multiple of the file's own batch; the batches are run one after the other.
        threads: threads that kernels may use.
        builtin_kernels: keep XNNPACK out.

    Raises:
        ValueError: if the runtime refuses the file, or an input does not fit it.
    """
    return Session(content, threads=threads, builtin_kernels=builtin_kernels).run(inputs)


def _shapes(details):
    return {name: tuple(int(n) for n in detail["shape"]) for name, detail in details.items()}


def _batches(details, arrays):
    """Batch of the file, and how many of them the arrays hold."""
    counts, shapes = set(), _shapes(details)
    for name, detail in details.items():
        array, shape = arrays[name], shapes[name]
        fits = array.shape[1:] == shape[1:] and array.dtype == detail["dtype"]
        if not fits or not len(array) or len(array) % shape[0]:
            raise ValueError(
                f"Input {name} must be {np.dtype(detail['dtype'])} of shape {shape}, the first "
                f"axis times any whole number. Got {array.dtype} of shape {array.shape}"
            )
        counts.add((shape[0], len(array) // shape[0]))
    if len(counts) > 1:
        raise ValueError("All inputs must hold the same number of samples.")
    return counts.pop()


def kernel_sets(content: bytes) -> dict[str, str]:
    """Which kernels run each operation: output tensor name -> `"XNNPACK"` or `"built-in"`.

    After a delegate took its part, the interpreter lists the original operations, then one node a
    partition. What lies between such a node's outputs and its inputs runs in the delegate.
    """
    interpreter = open_interpreter(content)
    # The only way that LiteRT's Python interface offers to the list of nodes.
    nodes = interpreter._get_ops_details()
    names = {t["index"]: t["name"] for t in interpreter.get_tensor_details()}
    operations = [node for node in nodes if node["op_name"] != _DELEGATE_NODE]
    producer = {int(index): node for node in operations for index in node["outputs"]}
    delegated = set()
    for node in nodes:
        if node["op_name"] == _DELEGATE_NODE:
            border = {int(index) for index in node["inputs"]}
            pending = [int(index) for index in node["outputs"]]
            while pending:
                index = pending.pop()
                if index in producer and index not in border and index not in delegated:
                    delegated.add(index)
                    pending.extend(int(i) for i in producer[index]["inputs"])
    return {names[i]: XNNPACK if i in delegated else BUILT_IN for i in producer}


def median_latency(
    content: bytes,
    *,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 5,
    builtin_kernels: bool = False,
) -> float:
    """Median milliseconds of one inference, on zeros.

    Args:
        content: bytes of a `.tflite` file.
        threads: threads that kernels may use.
        runs: timed inferences.
        warmup: inferences before them, not timed.
        builtin_kernels: keep XNNPACK out.
    """
    interpreter = open_interpreter(content, threads=threads, builtin_kernels=builtin_kernels)
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    times = []
    for _ in range(warmup + runs):
        start = time.perf_counter()
        interpreter.invoke()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warmup:]) * 1e3)
