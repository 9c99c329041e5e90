"""MobileNetV2 1.0 at 224 px, post-training w8a8, against another int8 file of the same weights.

    PYTHONPATH=. python tests/benchmarks/mobilenet_v2.py --images imagenet.npz \
        --weights float.weights.h5 [--peer peer.tflite] [--scheme w8a8] \
        [--out docs/results/mobilenet_v2_w8a8.json]

`--images`: an `.npz` with `x` (uint8, 224 px) and `y`. Even-numbered images calibrate, odd-numbered
ones measure; everything is read from the exported file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
import tflite_export
from keras_lowbit.cli.measure import wilson
from tests.benchmarks.convert_cost import convert_apart
from tflite_export import runtime


def snr(wanted, got):
    """Signal-to-noise ratio in dB."""
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)))


def seconds(function):
    """`(result, seconds)`."""
    start = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - start, 2)


def logits_of(content, images):
    """Outputs of a file for uint8 images."""
    session = runtime.Session(content)
    ((name, _),) = session.inputs.items()
    return next(iter(session.run({name: images}).values()))


def without_softmax(content):
    """A file that ends where another one's softmax begins."""
    schema = runtime.require("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(bytearray(content), 0)
    (graph,) = model.subgraphs
    softmax = schema.BuiltinOperator.SOFTMAX
    (last,) = (
        op for op in graph.operators if model.operatorCodes[op.opcodeIndex].builtinCode == softmax
    )
    graph.outputs, model.signatureDefs = [last.inputs[0]], []
    builder = runtime.require("flatbuffers").Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def reals_of(content, images):
    """Outputs of a file, whose one output tensor holds codes, in reals."""
    (detail,) = runtime.open_interpreter(content).get_output_details()
    scale, zero_point = detail["quantization"]
    return scale * (logits_of(content, images).astype("float32") - zero_point)


def latency_ratio(ours, theirs, image, rounds=60):
    """Ratio of median latencies of two files, run in turn in one process."""
    sessions = [runtime.Session(ours), runtime.Session(theirs)]
    feeds = [{next(iter(s.inputs)): image} for s in sessions]
    times = [[], []]
    for _ in range(rounds + 5):
        for session, feed, found in zip(sessions, feeds, times, strict=True):
            start = time.perf_counter()
            session.run(feed)
            found.append(time.perf_counter() - start)
    ours_ms, theirs_ms = (1000 * statistics.median(found[5:]) for found in times)
    return {"ours_ms": ours_ms, "theirs_ms": theirs_ms, "ratio": ours_ms / theirs_ms}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--images", "--weights"):
        parser.add_argument(name, required=True)
    parser.add_argument("--peer")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--correction", type=int, default=32)
    parser.add_argument("--method", default="mse")
    parser.add_argument("--json", "--out", dest="out")
    given = parser.parse_args()
    with np.load(given.images) as stored:
        x, y = stored["x"], stored["y"]
    even, odd, truth = x[0::2], x[1::2], y[1::2]

    def scaled(images):
        return images.astype("float32") / 127.5 - 1

    model = keras.applications.MobileNetV2(weights=None, classifier_activation=None)
    model.load_weights(given.weights)
    wanted = model.predict(scaled(odd), batch_size=20, verbose=0)
    result = {"scheme": given.scheme, "backend": keras.backend.backend(), "images": len(odd)}
    quantized, result["quantize_s"] = seconds(
        lambda: klb.quantize_model(model, given.scheme, input_range=(-1, 1))
    )
    chosen = scaled(even[:: max(1, len(even) // given.calibration)])
    _, result["calibrate_s"] = seconds(
        lambda: klb.calibrate(quantized, chosen, method=given.method, batch_size=10)
    )
    if given.correction:
        spread = scaled(even[:: max(1, len(even) // given.correction)])
        _, result["correct_s"] = seconds(lambda: klb.correct_biases(quantized, model, spread))
    export, result["convert_s"] = seconds(
        lambda: tflite_export.convert(quantized, input_type="uint8")
    )
    result["convert_memory"] = convert_apart(quantized)
    got = logits_of(export.content, odd)
    right = int((got.argmax(-1) == truth).sum())
    result.update(
        bytes=len(export.content),
        agreement=float((got.argmax(-1) == wanted.argmax(-1)).mean()),
        snr_db=snr(wanted, got),
        accuracy=right / len(odd),
        interval=wilson(right, len(odd)),
        float_accuracy=float((wanted.argmax(-1) == truth).mean()),
        wrong_codes=tflite_export.convert(quantized, input_type="uint8", verify=odd[:4]).mismatches,
    )
    if given.peer:
        theirs = Path(given.peer).read_bytes()
        softmax = keras.Model(quantized.input, keras.layers.Softmax()(quantized.output))
        same_ends = tflite_export.convert(softmax, input_type="uint8", output_type="uint8")
        result["same_ends_bytes"] = len(same_ends.content)
        result["peer_bytes"] = len(theirs)
        # Its 1,001 classes begin with "background".
        said = logits_of(theirs, odd)[:, -wanted.shape[-1] :].argmax(-1)
        result["peer_agreement"] = float((said == wanted.argmax(-1)).mean())
        theirs_logits = reals_of(without_softmax(theirs), odd)[:, -wanted.shape[-1] :]
        result["peer_snr_db"] = snr(wanted, theirs_logits)
        result["peer_accuracy"] = float((said == truth).mean())
        result["latency"] = latency_ratio(same_ends.content, theirs, odd[:1])
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
