"""Where a trained Keras model and its file part: codes that differ, layer by layer.

    PYTHONPATH=. python tests/benchmarks/float_noise.py mobilenet_v2_w4a8 [--images 2] [--json OUT]

Smooth random images go through the model as trained, in float32, and through the integer graph;
both give codes of every tensor. The first differences are values that float32 puts on the other
side of the middle between two codes; what follows reads them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras
import numpy as np

from keras_lowbit import walk, zoo
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from tflite_export import convert

SUFFIX = "_quantize"  # of the layer whose grid a tensor sits on
# A tensor's reals are whole multiples of its scale up to float32, and codes reach 255.
WHOLE = 1e-3


def smooth_images(count: int, shape, seed: int = 0) -> np.ndarray:
    """Pixels 0..255 of few coarse patches with some noise, float32 `(count, *shape)`."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 7, 7, shape[-1]))
    rows, columns = (np.arange(n) * 7 // n for n in shape[:2])
    smooth = coarse[:, rows][:, :, columns]
    return np.clip(smooth + random.integers(-20, 21, smooth.shape), 0, 255).astype("float32")


def differences(model: keras.Model, images: np.ndarray) -> list[dict]:
    """Layers in the order of the model: `layer`, `op`, `wrong` and `compared` codes.

    Args:
        model: a trained quantized model with one input.
        images: `(n, height, width, channels)`, as the model takes them.
    """
    graph = convert(model).graph
    (name,) = graph.inputs
    codes = reference.run(graph, {name: images.astype(graph.tensors[name].dtype)})
    skipped = (ir.Quantize, ir.Dequantize)
    computed = [op for op in graph if not isinstance(op, skipped)]
    # A fused activation names the tensor, the layer that makes it the operation.
    ops = {op.source: op for op in computed} | {op.output: op for op in computed}
    found = []

    def execute(call, args, kwargs):
        result = walk.infer(call, args, kwargs)
        layer = call.name.removesuffix(SUFFIX)
        if call.name.endswith(SUFFIX) and layer in ops:
            grid = graph.tensors[ops[layer].output]
            reals = keras.ops.convert_to_numpy(call.operation.quantizer(args[0])) / grid.scale
            if np.abs(reals - np.round(reals)).max() > WHOLE:
                raise ValueError(f"{call.name} is on another grid than the file's {grid.name}")
            wrong = int((np.round(reals) + grid.zero_point != codes[grid.name]).sum())
            row = {"layer": layer, "op": ops[layer].kind, "wrong": wrong}
            found.append(row | {"compared": reals.size})
        return result

    program = walk.flatten(model)
    walk.forward(program, [keras.ops.convert_to_tensor(images)], execute)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a released model")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = zoo.load(given.name)
    rows = differences(model, smooth_images(given.images, model.input_shape[1:]))
    for row in rows:
        print(f"{row['layer']:32} {row['wrong']:9,} of {row['compared']:9,}")
    if given.json:
        content = {"model": given.name, "images": given.images, "layers": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
