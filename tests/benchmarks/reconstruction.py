"""MobileNetV2 1.0 at 224 px by block reconstruction: w8a8, w4a8 and w4a4, without labels.

    PYTHONPATH=. python tests/benchmarks/reconstruction.py --images imagenet.npz \
        --weights float.weights.h5 [--schemes w8a8 w4a8 w4a4] [--steps N] [--folder runs] \
        [--out docs/results/mobilenet_v2_reconstruction.json]

`--images`: an `.npz` with `x` (uint8, 224 px) and `y`. Even-numbered images calibrate and tune,
odd-numbered ones measure; agreement with the float model, signal-to-noise ratio of logits and
accuracy are read from the exported file, before and after. With `--folder` a killed run goes on,
block by block. `--limit` takes fewer images, to try it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
import tflite_export
from keras_lowbit.cli.measure import wilson
from tests.benchmarks.mobilenet_v2 import logits_of, seconds, snr

# Steps a block, share of dropped elements, whether means are matched: more steps gained nothing by
# hand, and at 8 bits dropping only adds noise.
SETTINGS = {"w8a8": (60, 0.0, True), "w4a8": (200, 0.5, False), "w4a4": (200, 0.5, False)}


def measured(model, images, truth, wanted, verify=0):
    """Figures of the exported file."""
    checked = images[:verify] if verify else None
    export = tflite_export.convert(model, input_type="uint8", verify=checked)
    got = logits_of(export.content, images)
    right = int((got.argmax(-1) == truth).sum())
    figures = {
        "bytes": len(export.content),
        "agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean()),
        "snr_db": snr(wanted, got),
        "accuracy": right / len(images),
        "interval": wilson(right, len(images)),
    }
    return {**figures, "wrong_codes": export.mismatches} if verify else figures


def run(scheme, model, even, odd, truth, wanted, given):
    """One scheme, from the folded float model to the figures."""
    steps, drop, match = SETTINGS[scheme]
    steps = given.steps or steps
    quantized = klb.quantize_model(model, scheme, input_range=(-1, 1))
    chosen = even[:: max(1, len(even) // given.calibration)]
    klb.calibrate(quantized, chosen, batch_size=10)
    result = {
        "scheme": scheme,
        "backend": keras.backend.backend(),
        "images": len(odd),
        "steps": steps,
        "drop": drop,
        "match_means": match,
        "float_accuracy": float((wanted.argmax(-1) == truth).mean()),
        "calibrated": measured(quantized, odd, truth, wanted),
    }
    folder = None if given.folder is None else Path(given.folder) / scheme
    done, result["reconstruct_s"] = seconds(
        lambda: klb.reconstruct(
            quantized, model, even, steps=steps, drop=drop, match_means=match, folder=folder
        )
    )
    print(done)
    result["blocks"] = [vars(block) for block in done.blocks]
    result["reconstructed"] = measured(quantized, odd, truth, wanted, verify=4)
    return result


def add_arguments(parser):
    """What benchmarks on calibration images take."""
    for name in ("--images", "--weights"):
        parser.add_argument(name, required=True)
    parser.add_argument("--limit", type=int, help="so many images only")
    parser.add_argument("--out")


def read(given):
    """`(folded float model, even images in -1..1, odd images, their classes, float logits)`."""
    with np.load(given.images) as stored:
        x, y = stored["x"][: given.limit], stored["y"][: given.limit]
    even, odd, truth = x[0::2].astype("float32") / 127.5 - 1, x[1::2], y[1::2]
    model = keras.applications.MobileNetV2(weights=None, classifier_activation=None)
    model.load_weights(given.weights)
    wanted = model.predict(odd.astype("float32") / 127.5 - 1, batch_size=20, verbose=0)
    return klb.fold_batchnorm(model), even, odd, truth, wanted


def write(results, out):
    """JSON, where a file is asked for."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(results, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--schemes", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--calibration", type=int, default=40)
    parser.add_argument("--folder")
    given = parser.parse_args()
    model, even, odd, truth, wanted = read(given)
    results = []
    for scheme in given.schemes:
        results.append(run(scheme, model, even, odd, truth, wanted, given))
        print(json.dumps({k: v for k, v in results[-1].items() if k != "blocks"}, indent=1))
        write(results, given.out)


if __name__ == "__main__":
    main()
