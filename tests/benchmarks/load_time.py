"""Seconds from `import keras` to a loaded model of the zoo, in fresh processes.

    PYTHONPATH=. KERAS_BACKEND=jax python tests/benchmarks/load_time.py \
        [resnet8_cifar10_w4a4] [--runs 5] [--out load_time.json]

Counts from behind `import keras`: importing `keras_lowbit` and `zoo.load`. Medians of the runs; the
bar is 1.5 s on TensorFlow and PyTorch and 2 s on JAX. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from keras_lowbit.progress import table
from tests.benchmarks.clock import processor

BARS = {"tensorflow": 1.5, "torch": 1.5, "jax": 2.0}
_JOB = """
import json, sys, time
import keras
start = time.perf_counter()
from keras_lowbit import zoo
ready = time.perf_counter()
zoo.load(sys.argv[1])
times = {"import": ready - start, "load": time.perf_counter() - ready}
print(json.dumps({"backend": keras.backend.backend(), **times}))
"""


def once(name: str) -> dict:
    """Backend and seconds of one fresh process.

    Raises:
        RuntimeError: the process failed; holds what it said.
    """
    done = subprocess.run(
        [sys.executable, "-c", _JOB, name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, runs: int) -> dict:
    """Medians over processes; a first one, not counted, fills the caches of the disk."""
    found = [once(name) for _ in range(runs + 1)][1:]
    backend = found[0]["backend"]
    result = {part: statistics.median(f[part] for f in found) for part in ("import", "load")}
    result["seconds"] = statistics.median(f["import"] + f["load"] for f in found)
    result |= {"name": name, "backend": backend, "bar": BARS[backend], "runs": runs}
    return {**result, "reached": result["seconds"] <= BARS[backend], "processor": processor()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="resnet8_cifar10_w4a4")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = measure(given.name, given.runs)
    title = f"{given.name} in a fresh process on {result['backend']}, {result['processor']}"
    parts = [f"{result[part]:.2f}" for part in ("import", "load", "seconds", "bar")]
    columns = ("import keras_lowbit, s", "zoo.load, s", "both, s", "bar, s", "reached")
    print(table(title, columns, [(*parts, "yes" if result["reached"] else "no")]))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
