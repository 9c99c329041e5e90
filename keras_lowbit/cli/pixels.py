"""How images become the input of a model or a file: as they are, as reals, or as codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_lowbit import walk
from keras_lowbit.cli import files
from keras_lowbit.integer import frozen
from keras_lowbit.integer import graph as ir
from keras_lowbit.kinds import kind_of, scaling_of, walk_back
from keras_lowbit.quantizers import Affine
from keras_lowbit.transform.plan import BEFORE_GRID
from tflite_export import runtime

PIXELS = (0, 255)
_TOP = 255  # of 256 codes; of pixels, too
# No grid that was calibrated on pixels ends below: one that does is of reals such as 0..1.
_FEWEST_PIXELS = 2.0
# Codes that a sample of reals spans at least: those of another normalisation span fewer.
_FEWEST = 16
# Share of a range by which images may lie outside: of one that was given, of one that was seen.
_OUTSIDE = {True: 0.05, False: 0.5}


def range_of(dataset) -> tuple[int, int] | None:
    """`input_range` of `quantize_model` for a data set: that of pixels, `None` for reals.

    A model without a `Rescaling` would take it from its calibration images; of dark ones the codes
    of a uint8 input would be no pixels.
    """
    return PIXELS if dataset.x_train.dtype == np.uint8 else None


@dataclass(frozen=True)
class Intake:
    """What an input takes: `real = low + scale * code` for codes 0..255, int8 ones moved by 128.

    Args:
        dtype: of the input.
        scale: `None` where nothing is known of a float input: it takes images as they are.
        low: what code 0 stands for.
        given: whether the range is that of pixels 0..255, as said to `quantize_model`; else it is
            read off a grid.
    """

    dtype: np.dtype
    scale: float | None = None
    low: float = 0.0
    given: bool = False

    @classmethod
    def of_model(cls, model: keras.Model) -> Intake:
        """Of a model's first input: float, quantized or frozen."""
        kind = files.kind(model)
        if kind == "frozen":
            return cls.of_graph(frozen.graph_of(model))
        dtype = np.dtype(keras.backend.standardize_dtype(model.inputs[0].dtype))
        found = _range(model) if kind == "quantized" else None
        if found is None:
            return cls(dtype, None if dtype.kind == "f" else 1.0)
        low, top, given = found
        return cls(dtype, (top - low) / _TOP, low, given)

    @classmethod
    def of_graph(cls, graph: ir.Graph) -> Intake:
        """Of an integer graph's first input."""
        name = graph.inputs[0]
        dtype, tensor = np.dtype(graph.tensors[name].dtype), graph.tensors[name]
        if dtype.kind == "f":
            tensor = graph.tensors[next(op.output for op in graph if name in op.inputs)]
        return cls._of_grid(dtype, np.dtype(tensor.dtype), tensor.scale, tensor.zero_point)

    @classmethod
    def of_file(cls, content: bytes) -> Intake:
        """Of a `.tflite`'s first input.

        Raises:
            ImportError: without the `tflite` extra.
        """
        schema = runtime.require("ai_edge_litert.schema_py_generated")
        graph = schema.Model.GetRootAs(content, 0).Subgraphs(0)
        names = {number: name for name, number in vars(schema.TensorType).items()}
        index = graph.Inputs(0)
        tensor = graph.Tensors(index)
        dtype = np.dtype(names[tensor.Type()].lower())
        if dtype.kind == "f":
            operations = map(graph.Operators, range(graph.OperatorsLength()))
            readers = [op for op in operations if index in op.InputsAsNumpy()]
            tensor = graph.Tensors(readers[0].Outputs(0)) if readers else tensor
        grid, stored = tensor.Quantization(), np.dtype(names[tensor.Type()].lower())
        if grid is None or grid.ScaleLength() != 1 or stored.kind == "f":
            return cls(dtype, None if dtype.kind == "f" else 1.0)
        return cls._of_grid(dtype, stored, grid.Scale(0), grid.ZeroPoint(0))

    @classmethod
    def _of_grid(cls, dtype, stored, scale, zero_point):
        scale = float(scale or 1.0)
        return cls(dtype, scale, 0.0 - scale * (int(zero_point) + 128 * (stored == np.int8)))

    @property
    def top(self) -> float:
        """What code 255 stands for."""
        return self.low + self.scale * _TOP

    def fitted(self, images: np.ndarray) -> np.ndarray:
        """Images in the input's type, by what they show of themselves: `reader(images)(images)`."""
        return self.reader(images)(images)

    def reader(self, sample: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What brings images of a data set into the input's type, decided once by a sample of it.

        Pixels 0..255 become the reals or codes that they stand for, where the range of the input
        shows that it is not of pixels itself; reals become codes of the grid.

        Raises:
            ValueError: images of another range than the input's, reals for an input of pixels; the
                reader too, of reals for an input of pixels.
        """
        if self.scale is None:
            return self._as_they_are
        whole = _are_pixels(sample)
        if self._takes_pixels() and self.dtype.kind != "f":
            return self._pixels_alone
        pixels = whole and self._is_beyond(sample)
        if not pixels:
            self._check_range(sample, whole)
        if self.dtype.kind == "f":
            return self._as_reals if pixels else self._as_they_are
        if pixels:
            return self._pixels_alone
        # A grid may stand beside 0.0, which a file does not say where code 0 is none either.
        if self.low:
            raise ValueError(
                f"The file takes {self.dtype} codes of scale {self.scale:.4g}, and does not tell "
                f"what code 0 stands for. The images hold {sample.dtype} in {sample.min():.4g}.."
                f"{sample.max():.4g}. Give pixels 0..255 as uint8, or evaluate the .keras"
            )
        return lambda images: self._coded(np.clip(np.rint(images / self.scale), 0, _TOP))

    def _as_they_are(self, images):
        return images.astype(self.dtype)

    def _as_reals(self, pixels):
        return (self.low + self.scale * pixels).astype(self.dtype)

    def _pixels_alone(self, images):
        if not _are_pixels(images):
            raise self._refused(images, f"takes {self.dtype}, so it needs pixels 0..255")
        return self._coded(images)

    def _takes_pixels(self):
        """Whether each pixel value is a code, up to the noise of float32."""
        return abs(self.scale - 1.0) * _TOP < 0.01

    def _is_beyond(self, images):
        """Whether pixels cannot be meant as reals of the range."""
        if self.low < -self.scale and images.dtype == np.uint8:
            return True
        small = self.given or self.low < -self.scale or self.top < _FEWEST_PIXELS
        return small and bool(images.max() > self.top + self.scale)

    def _check_range(self, images, whole):
        low, top = float(images.min()), float(images.max())
        above, below = (
            _OUTSIDE[tight] * _TOP * self.scale
            for tight in (self.given, self.given or self.dtype.kind != "f")
        )
        # Reals saturate in a file as they do in its model, which knows no range to be told of.
        told = self.given or self.dtype.kind != "f" or self.top < _FEWEST_PIXELS
        ends = f"{self.low:.4g}..{self.top:.4g} (scale {self.scale:.4g})"
        if told and (low < self.low - below or top > self.top + above):
            raise self._refused(images, f"takes images of {ends}")
        if (told or self._takes_pixels()) and not whole and top - low < _FEWEST * self.scale:
            takes = "pixels 0..255" if self._takes_pixels() else f"images of {ends}"
            raise self._refused(images, f"takes {takes}, of which these are a small part")

    def _coded(self, pixels):
        return (pixels.astype("int16") - 128 * (self.dtype == np.int8)).astype(self.dtype)

    def _refused(self, images, why):
        return ValueError(
            f"The model {why}. The images hold {images.dtype} in {images.min():.4g}.."
            f"{images.max():.4g}. Give images of the range that it was made for, or make it for "
            "theirs: quantize_model(..., input_range=...), the reals of pixel 0 and pixel 255"
        )


def _are_pixels(images):
    if images.dtype == np.uint8:
        return True
    return bool(images.min() >= 0 and images.max() <= _TOP and np.all(images == np.rint(images)))


def _range(model) -> tuple[float, float, bool] | None:
    """Reals of the first and last code of images before any rescaling, and whether they were given.

    `None` without a grid of images that has a scale.
    """
    program = walk.flatten(model)
    producers = program.producers()
    for call in program.calls:
        quantizer = getattr(call.operation, "quantizer", None)
        if kind_of(call) != "quantize" or not isinstance(quantizer, Affine):
            continue
        if not quantizer.is_calibrated:
            continue
        scale = quantizer.get_config()["scale"]
        given = scale is not None
        scale = scale if given else float(quantizer.grid().scale)
        ends = [quantizer.offset + scale * code for code in quantizer.static_bounds()]
        before = walk_back(producers, call.inputs[0], BEFORE_GRID)
        while before is not None and kind_of(before) == "rescaling":
            gain, shift = scaling_of(before)
            ends = [(end - float(shift)) / float(gain) for end in ends]
            before = walk_back(producers, before.inputs[0], BEFORE_GRID)
        if before is None:
            return ends[0], ends[1], given
    return None
