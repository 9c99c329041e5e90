"""From a trained Keras model to a `.tflite` whose integers are the trained ones."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.checks import checked_choice, checked_count
from keras_lowbit.integer import frozen as frozen_models
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer.build import (
    TYPES,
    WEIGHTS,
    integer_graph,
    objections,
    stored,
)
from keras_lowbit.integer.integer_op import IntegerOp
from keras_lowbit.integer.values import NotExportable
from keras_lowbit.kinds import kind_of
from keras_lowbit.progress import table
from keras_lowbit.transform import quantize_model
from keras_lowbit.whole_files import replacing
from tflite_export import runtime, targets
from tflite_export.verify import Verification
from tflite_export.verify import verify as compare


@dataclass(frozen=True)
class ExportResult:
    """A file and what is known of it. `print(result)` shows a table.

    Args:
        content: bytes of the `.tflite`.
        graph: the integer graph it was written from.
        target: name of the target.
        weights: containers of kernels, as given.
        verification: codes compared and wrong, tensor by tensor; `None` without images.
        built: the graph as a Keras model where one was built already, handed out as `frozen`.
    """

    content: bytes
    graph: ir.Graph
    target: str
    weights: str
    verification: Verification | None = None
    built: keras.Model | None = None

    @property
    def mismatches(self) -> int | None:
        """Wrong codes over every tensor; `None` when nothing was verified."""
        return None if self.verification is None else self.verification.wrong

    @functools.cached_property
    def frozen(self) -> keras.Model:
        """The Keras model whose forward pass is the file's integer arithmetic.

        Of several outputs it returns a list, in the order of `graph.outputs`.
        """
        return self.built or frozen_models.build(self.graph)

    def verified(self, images) -> ExportResult:
        """The same file, compared on images; see `verify` of `convert`.

        Raises:
            ValueError: images that do not fit the file's input.
        """
        arrays = fitting_images(self.graph, images)
        keras_codes = frozen_models.tensors_of(self.frozen, arrays)
        inside = {name: keras_codes[name] for name in keras_codes if name not in self.graph.inputs}
        verification = compare(self.graph, self.content, arrays, inside)
        return dataclasses.replace(self, verification=verification, built=self.frozen)

    @functools.cached_property
    def report(self) -> dict:
        """Sizes, kernel sets and counts, for a JSON file."""
        kernels = runtime.kernel_sets(self.content)
        counts = {} if self.verification is None else self.verification.by_tensor
        rows = []
        for op in self.graph:
            count = counts.get(op.output)
            product = isinstance(op, ir.Product)
            rows.append(
                {
                    "tensor": op.output,
                    "layer": op.source,
                    "op": op.kind,
                    "shape": list(self.graph.tensors[op.output].shape),
                    "kernel_bits": op.kernel_bits if product else None,
                    "storage": op.storage if product else None,
                    "kernels": kernels.get(op.output, ""),
                    "compared": None if count is None else count.compared,
                    "wrong": None if count is None else count.wrong,
                }
            )
        return {
            "bytes": len(self.content),
            "target": self.target,
            "weights": self.weights,
            "images": None if self.verification is None else self.verification.images,
            "wrong": self.mismatches,
            "ops": rows,
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file under a temporary name, then rename; the path written.

        Raises:
            ValueError: the folder does not exist.
            OSError: the disk is full or refuses; names the file. An older file is untouched.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(
                f"{path} cannot be written: there is no folder {path.parent}. Make it first"
            )
        with replacing(path) as temporary:
            temporary.write_bytes(self.content)
        return path

    def __str__(self) -> str:
        report = self.report
        columns = ("tensor", "op", "shape", "bits", "stored", "kernels", "wrong", "compared")
        rows = [
            (
                row["tensor"],
                row["op"],
                "x".join(str(n) for n in row["shape"]),
                row["kernel_bits"] or "",
                row["storage"] or "",
                row["kernels"],
                "" if row["wrong"] is None else row["wrong"],
                "" if row["compared"] is None else f"{row['compared']:,}",
            )
            for row in report["ops"]
        ]
        title = f"{report['bytes']:,} bytes for {self.target}, weights={self.weights}"
        verdict = "not verified: pass verify=images"
        if self.verification is not None:
            verdict = str(self.verification)
        return f"{table(title, columns, rows)}\n{verdict}"


def convert(
    model: keras.Model,
    target: str = "android",
    weights: str = "int8",
    *,
    input_type: str | None = None,
    output_type: str = "float32",
    preprocessing=None,
    verify=None,
    batch: int = 1,
) -> ExportResult:
    """Write a quantized model as a `.tflite`, and prove it on images.

    Args:
        model: a trained model (quantized and calibrated), or one of `keras_lowbit.freeze`, whose
            file has the types and containers that `freeze` was given: others are refused.
        target: `"android"` (LiteRT, default kernels), `"builtin"` (also tflite-runtime 2.14) or
            `"coral"` (what Coral's `edgetpu_compiler` takes; how the Edge TPU rounds is its own).
        weights: `"int8"`, the fast form; `"int4"`, dense and pointwise kernels of 4 bits or less
            as int4, exact too; `"int4_all"`, every kernel that fits, smallest, with k x k and
            depthwise kernels on slower built-in kernels that round otherwise.
        input_type: `"float32"`, `"uint8"` or `"int8"`; `None` takes float32 where the input's
            grid allows it, else uint8 (raw pixels).
        output_type: `"float32"`, `"uint8"` or `"int8"`.
        preprocessing: for a model whose images arrive preprocessed: `(scale, offset)`, so that
            `scale * pixel + offset` is what the model takes (numbers, or one a channel), or a
            `Rescaling` or `Normalization` layer. The file then takes raw pixels (uint8 by
            default). Where the model's input grid has a code for each pixel value
            (`quantize_model(input_range=...)`) nothing is added; else one operation brings
            pixels to the trained grid.
        verify: images, in the type of the file's input (whole-number arrays fit any of them).
            Every tensor is compared with the reference interpreter, in LiteRT and in Keras.
        batch: images that the file takes at a time. Write a file for each number that is needed:
            LiteRT's `resize_tensor_input` cannot change that of a file with reshapes or slices.

    Returns:
        An `ExportResult`.

    Raises:
        NotExportable: layers that have no integer form, or that the target refuses, by name.
        ValueError: an unknown target or type, images that do not fit, or options that a frozen
            model was not frozen with.
        ImportError: without the `tflite` extra.
    """
    from tflite_export import flatbuffer  # at its use: only files need the `tflite` extra

    place = targets.find(target)
    checked_choice(weights, WEIGHTS, who="weights")
    options = {
        "batch": batch,
        "input_type": input_type,
        "output_type": output_type,
        "weights": weights,
    }
    walk.check_model(model)
    if _is_frozen(model):
        graph, weights = _frozen_graph(model, preprocessing, options)
    else:
        graph = integer_graph(model, preprocessing=preprocessing, **options)
    found = targets.objections(graph.ops, graph.tensors, place)
    if found:
        raise NotExportable(_sentence(place, found))
    content = flatbuffer.write(graph, joins_zeros=place.joins_zeros)
    result = ExportResult(content, graph, target, weights)
    return result if verify is None else result.verified(verify)


def _frozen_graph(model, preprocessing, options):
    """`(graph, containers of its kernels)` of a frozen model; what it cannot be is refused.

    Raises:
        ValueError: an option that is no default and that the model was not frozen with.
    """
    if preprocessing is not None:
        raise ValueError(f"{model.name} is frozen: give preprocessing to freeze")
    graph = frozen_models.graph_of(model)
    weights, asked = _containers(graph), options["weights"]
    if WEIGHTS.index(asked) > WEIGHTS.index(weights) and _holds(graph, asked):
        weights = asked  # no kernel fits a smaller container, so both say the same
    has = {
        "input_type": {graph.tensors[name].dtype for name in graph.inputs},
        "output_type": {graph.tensors[name].dtype for name in graph.outputs},
        "weights": {weights},
    }
    defaults = {"input_type": None, "output_type": TYPES[0], "weights": WEIGHTS[0]}
    for name, default in defaults.items():
        given = options[name]
        checked_choice(given, WEIGHTS if name == "weights" else (*TYPES, default), who=name)
        if given != default and has[name] != {given}:
            found = ", ".join(repr(x) for x in sorted(has[name]))
            raise ValueError(
                f"{model.name} is frozen with {name}={found}. For {given!r} give {name} to freeze, "
                "or convert the trained model"
            )
    return _of_batch(graph, options["batch"]), weights


def _of_batch(graph, batch):
    """The graph for another number of images: nothing in it moves the first axis."""
    batch = checked_count(batch, who="batch", least=1)
    if batch == 1:
        return graph
    tensors = {
        name: dataclasses.replace(t, shape=(batch, *t.shape[1:]))
        for name, t in graph.tensors.items()
    }
    return dataclasses.replace(graph, tensors=tensors)


def _containers(graph):
    """The choice of `weights` that a graph's kernels show."""
    products = [op for op in graph if isinstance(op, ir.Product)]
    if all(op.storage == "int8" for op in products):
        return "int8"
    plain = [dataclasses.replace(op, storage="int8") for op in products]
    made = [stored(op, graph.tensors, "int4").storage for op in plain]
    return "int4" if made == [op.storage for op in products] else "int4_all"


def _holds(graph, weights):
    """Whether `weights` would leave every kernel in the container that it has."""
    products = [op for op in graph if isinstance(op, ir.Product)]
    return all(stored(op, graph.tensors, weights).storage == op.storage for op in products)


def fitting_images(graph: ir.Graph, images) -> dict[str, np.ndarray]:
    """Images by input name, cast to each input's type: reals rounded to float32, codes exactly.

    Raises:
        ValueError: no images, reals for an integer input, what is no number, or another number of
            arrays than inputs.
    """
    if not isinstance(images, dict):
        arrays = images if isinstance(images, (list, tuple)) else [images]
        if len(arrays) != len(graph.inputs):
            raise ValueError(f"The file has {len(graph.inputs)} inputs. Got {len(arrays)} arrays")
        images = dict(zip(graph.inputs, arrays, strict=True))
    cast = {}
    for name, array in images.items():
        array = np.asarray(array)
        wanted = graph.tensors[name].dtype if name in graph.tensors else array.dtype
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(f"Input {name}: at least one image is needed. Got {array.shape}")
        converted = array.astype(wanted)
        # A float32 input takes what is nearest to a float64, as Keras does.
        real = wanted == "float32" and np.all(np.isfinite(converted))
        if not real and not np.array_equal(converted, array):
            raise ValueError(
                f"Input {name} takes {wanted}: the images hold other values "
                f"({array.dtype}, {array.min()}..{array.max()})"
            )
        cast[name] = converted
    return cast


def check(
    model: keras.Model,
    target: str = "android",
    *,
    weights: str = "int8",
    input_type: str | None = None,
    output_type: str = "float32",
) -> list[str]:
    """Every objection of `convert` to a model, before anyone trains; empty where there is none.

    The inputs are those of a `convert` without `preprocessing`.

    Args:
        model: a float model, which is looked at as one of 8 bits, or a quantized one, which need
            not be calibrated.
        target: name of a target.
        weights: as for `convert`; which kernels become int4 follows from their bits.
        input_type: as for `convert`.
        output_type: as for `convert`.

    Raises:
        ValueError: an unknown target, type or choice of weights, or a model without a graph.
    """
    place = targets.find(target)
    checked_choice(weights, WEIGHTS, who="weights")
    checked_choice(input_type, (None, *TYPES), who="input_type")
    checked_choice(output_type, TYPES, who="output_type")
    options = {"weights": weights, "input_type": input_type, "output_type": output_type}
    program = walk.flatten(model)
    try:
        if _is_frozen(model):
            graph, _ = _frozen_graph(model, None, {"batch": 1, **options})
            return targets.objections(graph.ops, graph.tensors, place)
        if not any(kind_of(call) == "quantize" for call in program.calls):
            program = walk.flatten(quantize_model(model, "w8a8"))
        found, operations, tensors = objections(program, **options)
    except ValueError as objection:
        # What no model can be built for stands before all that each layer might object to.
        return [str(objection)]
    return found + targets.objections(operations, tensors, place)


def _is_frozen(model):
    return any(isinstance(layer, IntegerOp) for layer in model.layers)


def _sentence(place, found):
    listed = "\n  ".join(found)
    return f"{place.name} ({place.runtime}) has {len(found)} objections:\n  {listed}"
