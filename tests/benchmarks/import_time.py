"""What `import keras_lowbit` adds to `import keras`.

    KERAS_BACKEND=tensorflow PYTHONPATH=. python tests/benchmarks/import_time.py [--rounds 9]
        [--json OUT]

Fresh processes in turn, `keras` alone and `keras` then `keras_lowbit`. What is added is the median
of the second import, timed inside its process: a backend's own import takes seconds, and its noise
would hide the figure in a difference of whole processes, which is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.clock import processor

BAR = 0.15  # seconds
LEAST_ROUNDS = 7

_CHILD = """
import time
start = time.perf_counter()
import keras
middle = time.perf_counter()
{second}
print(middle - start, time.perf_counter() - middle)
"""
SECOND = {"keras": "", "keras_lowbit": "import keras_lowbit"}


def once(name: str) -> tuple[float, float]:
    """Seconds of `import keras` and of what follows it, in a fresh process."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(second=SECOND[name])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    first, second = child.stdout.split()[-2:]
    return float(first), float(second)


def measure(rounds: int, run=once) -> dict:
    """`keras_s`, `added_s`, `difference_s` and `added_all_s`, the first round left out.

    The first round fills the disk's cache and writes byte code.

    Raises:
        ValueError: fewer than 7 rounds, which a median of imports needs.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"import_time: rounds must be at least {LEAST_ROUNDS}. Got {rounds}")
    found = {name: [] for name in SECOND}
    for i in range(rounds + 1):
        for name, times in found.items():
            pair = run(name)
            if i:
                times.append(pair)
    alone, both = ([sum(pair) for pair in found[name]] for name in SECOND)
    added = [second for _, second in found["keras_lowbit"]]
    return {
        "keras_s": statistics.median(alone),
        "added_s": statistics.median(added),
        "difference_s": statistics.median(both) - statistics.median(alone),
        "added_all_s": added,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json")
    given = parser.parse_args()
    result = measure(given.rounds)
    result |= {
        "bar_s": BAR,
        "backend": os.environ.get("KERAS_BACKEND", "Keras' choice"),
        "processor": processor(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        Path(given.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
