"""What every peer is timed on: arguments, data, the row. NumPy and the standard library only."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from tests.benchmarks.clock import alternate, fastest, processor

SHAPE, CLASSES = (32, 32, 3), 10


def arguments(doc: str) -> argparse.Namespace:
    """`--json OUT [--batch 128] [--blocks 3] [--rounds 7] [--forms plain]`.

    3 blocks a group are ResNet-20; without `--forms`, all of a peer's are timed.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json")
    parser.add_argument("--forms", nargs="+")
    for name, value in (("batch", 128), ("blocks", 3), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def batch_of(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images in -1..1, channels last, and classes."""
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, (size, *SHAPE)).astype("float32")
    return x, random.integers(0, CLASSES, size)


def report(
    peer: str,
    scheme: str,
    packages: Iterable[str],
    steps: Mapping[tuple[str, str], Callable[[], object]],
    given: argparse.Namespace,
) -> dict:
    """Time the steps in turn, print the row and write it.

    Args:
        peer: its name.
        scheme: bits, as `w4a4`.
        packages: distributions whose versions the row states.
        steps: training steps by `("float" or "quantized", form)`. A form that the peer cannot run
            is left out of the timing, and the row says why.
        given: of `arguments`.

    Returns:
        `peer, scheme, versions, ms` (`"float plain": ...`), `ratio` (speed, fastest quantized form
        over fastest float form), `refused` (`"quantized jit": reason`), `batch`, `processor`.
    """
    works, refused = {}, {}
    asked = {k: v for k, v in steps.items() if given.forms is None or k[1] in given.forms}
    for label, step in asked.items():
        try:
            step()
            works[label] = step
        except Exception as error:  # whatever a peer raises is what the row reports
            refused[" ".join(label)] = reason_of(error)
    if {kind for kind, _ in works} != {"float", "quantized"}:
        raise SystemExit(f"{peer}: no form to compare. {refused}")
    times = alternate(works, given.rounds)
    best = fastest(times)
    row = {
        "peer": peer,
        "scheme": scheme,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "ms": {" ".join(label): round(1000 * t, 2) for label, t in times.items()},
        "ratio": round(best["float"] / best["quantized"], 3),
        "refused": refused,
        "batch": given.batch,
        "blocks": given.blocks,
        "processor": processor(),
    }
    text = json.dumps(row, indent=1)
    print(text)
    if given.json:
        Path(given.json).write_text(text + "\n")
    return row


def reason_of(error: BaseException) -> str:
    """One line of an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
