"""Seconds and peak memory of one `tflite_export.convert`, in a process of its own.

    PYTHONPATH=. python tests/benchmarks/convert_cost.py --model quantized.keras [--json OUT]
    PYTHONPATH=. python tests/benchmarks/convert_cost.py [--size 224] [--scheme w8a8] [--json OUT]

Without `--model`, a MobileNetV2 with random weights, whose cost is that of a trained one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.clock import processor

MEBI = 2**20


def reset_peak() -> bool:
    """Let the peak begin at what is resident now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Most memory that was resident, in MiB.

    Linux: of this program since `reset_peak`. `ru_maxrss` there starts at what the parent that
    spawned this process had resident, which a test holding a model would measure instead.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (w for w in status.read_text().splitlines() if w.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEBI
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / MEBI


def convert_here(path: str) -> dict:
    """Load and convert; `convert_s`, `before_mib`, `peak_mib`, `added_mib`, `bytes`."""
    import keras

    import keras_lowbit  # noqa: F401  registers the layers of the file
    import tflite_export

    model = keras.saving.load_model(path, compile=False)
    reset_peak()
    before, start = peak_mib(), time.perf_counter()
    content = tflite_export.convert(model, input_type="uint8").content
    seconds, peak = time.perf_counter() - start, peak_mib()
    return {
        "convert_s": round(seconds, 2),
        "before_mib": round(before, 1),
        "peak_mib": round(peak, 1),
        "added_mib": round(peak - before, 1),
        "bytes": len(content),
    }


def convert_apart(model) -> dict:
    """`convert_here` of a model in a fresh process, whose peak knows nothing of this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return _child(path)


def _child(path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.convert_cost", "--child", str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_mobilenet(size, scheme):
    """MobileNetV2 with random weights, quantized and calibrated on noise."""
    import keras
    import numpy as np

    import keras_lowbit as klb

    model = keras.applications.MobileNetV2(
        weights=None, classifier_activation=None, input_shape=(size, size, 3)
    )
    images = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype("float32")
    return klb.calibrate(klb.quantize_model(model, scheme, input_range=(-1, 1)), images)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(convert_here(given.child)))
        return
    if given.model:
        result = _child(given.model)
    else:
        result = convert_apart(random_mobilenet(given.size, given.scheme))
        result |= {"net": "mobilenet_v2", "size": given.size, "scheme": given.scheme}
    text = json.dumps(result | {"processor": processor()}, indent=1)
    print(text)
    if given.json:
        Path(given.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
