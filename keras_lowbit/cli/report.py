"""What was measured of a recipe's models and files, and what computed it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from keras_lowbit import __version__
from keras_lowbit.cli import measure
from keras_lowbit.progress import table

# Containers whose kernels LiteRT's built-in code rounds otherwise than the reference.
ROUND_OTHERWISE = ("int4_all",)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version(), "keras_lowbit": __version__}
    for name in ("keras", "numpy", "ai-edge-litert", "jax", "torch", "tensorflow"):
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
    return found


def report(metrics: dict, out: Path) -> str:
    """A table of what was measured."""
    rows = []
    for name, scored in metrics["accuracy"].items():
        file = metrics["files"].get(f"model_{name}.tflite", {})
        wrong = file.get("wrong_codes")
        checked = "" if wrong is None else f"{wrong} of {file['compared_codes']:,}"
        size, same = file.get("bytes"), scored.get("agreement")
        rows.append(
            (
                str(out / f"model_{name}.tflite") if file else name,
                measure.shown(scored),
                "" if size is None else f"{size:,}",
                "" if same is None else f"{same:.2%}",
                checked,
            )
        )
    columns = ("model", "accuracy (95 %)", "bytes", "same as quantized", "wrong codes")
    count = next(iter(metrics["accuracy"].values()))["images"]
    return table(f"{metrics['data']}: {count:,} {metrics['judged_on']}", columns, rows)


def wrong_codes(metrics: dict) -> int:
    """Wrong codes over all files whose kernels are meant to be exact."""
    known = {f"model_{weights}.tflite" for weights in ROUND_OTHERWISE}
    files = metrics["files"].items()
    return sum(file["wrong_codes"] or 0 for name, file in files if name not in known)
