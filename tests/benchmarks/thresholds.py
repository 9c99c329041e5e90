"""Trained thresholds on MobileNetV2 1.0 at 224 px, w8a8, without labels: the paper's ladder.

    PYTHONPATH=. python tests/benchmarks/thresholds.py --images imagenet.npz \
        --weights float.weights.h5 [--epochs 6] [--batch 10] \
        [--out docs/results/mobilenet_v2_thresholds.json]

`--images` as in `reconstruction.py`. Five rungs: one threshold a kernel, calibrated; the same with
depthwise kernels rescaled; the same trained; one threshold a filter, calibrated; and trained.
Even-numbered images calibrate and tune, odd-numbered ones measure, through the exported file.
"""

from __future__ import annotations

import argparse

import keras

import keras_lowbit as klb
from tests.benchmarks.mobilenet_v2 import seconds
from tests.benchmarks.reconstruction import add_arguments, measured, read, write

SCALAR, VECTOR = False, True
# Name, one threshold a filter, depthwise kernels rescaled, thresholds trained.
RUNGS = (
    ("scalar", SCALAR, False, False),
    ("scalar, rescaled", SCALAR, True, False),
    ("scalar, rescaled, trained", SCALAR, True, True),
    ("per filter", VECTOR, False, False),
    ("per filter, trained", VECTOR, False, True),
)


def quantized(model, per_channel, images, batch_size=20):
    """Calibrated on ranges that cover all images, as the method asks."""
    scheme = klb.Scheme(kernel="threshold", activation="threshold", per_channel=per_channel)
    made = klb.quantize_model(model, scheme, input_range=(-1, 1))
    return klb.calibrate(made, images, method="minmax", batch_size=batch_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pointwise", type=int, default=0, help="epochs for factors of weights")
    parser.add_argument("--batch", type=int, default=10, help="images a step; 20 take 14 GB")
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--rungs", nargs="+", default=[name for name, *_ in RUNGS])
    given = parser.parse_args()
    model, even, odd, truth, wanted = read(given)
    chosen = even[:: max(1, len(even) // given.calibration)]
    rescaled = None
    results = []
    for name, per_channel, rescale, train in RUNGS:
        if name not in given.rungs:
            continue
        if rescale and rescaled is None:
            rescaled = klb.rescale_pairs(model, chosen, batch_size=20)
        made = quantized(rescaled if rescale else model, per_channel, chosen)
        row = {"rung": name, "backend": keras.backend.backend(), "images": len(odd)}
        if train:
            tuning, row["tune_s"] = seconds(
                lambda made=made: klb.tune_thresholds(
                    made,
                    model,
                    even,
                    epochs=given.epochs,
                    pointwise_epochs=given.pointwise,
                    batch_size=given.batch,
                )
            )
            row.update(
                epochs=given.epochs,
                batch=given.batch,
                distance=[tuning.before, *tuning.history, tuning.after],
            )
        row.update(measured(made, odd, truth, wanted, verify=4))
        results.append(row)
        print({k: v for k, v in row.items() if k != "distance"}, flush=True)
        write(results, given.out)


if __name__ == "__main__":
    main()
