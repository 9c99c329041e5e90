"""Modules of `zoo/`, which are scripts and not importable."""

import importlib.util
import sys
from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "zoo"


def script(name):
    """A fresh module of `zoo/<name>.py`."""
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
