"""How the benchmarks time: steps in turn, medians, and the name of the processor.

Standard library only, so that environments without Keras can use it.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# The first step compiles, the second warms up.
WARM = 2


def alternate(
    steps: Mapping[tuple[str, str], Callable[[], object]], rounds: int, warm: int = WARM
) -> dict[tuple[str, str], float]:
    """Median seconds of each step, all run in turn, so that a slow minute slows all of them.

    Args:
        steps: what to run, by `(kind, form)`; each ends only when its work is done.
        rounds: how often each is timed.
        warm: untimed rounds before.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"alternate: rounds must be at least 1. Got {rounds}")
    times = {label: [] for label in steps}
    for i in range(warm + rounds):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warm:
                times[label].append(time.perf_counter() - start)
    return {label: statistics.median(found) for label, found in times.items()}


def fastest(times: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Seconds of each kind in its fastest form."""
    return {k: min(t for (kind, _), t in times.items() if kind == k) for k, _ in times}


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
