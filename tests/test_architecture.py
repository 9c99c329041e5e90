"""The floors of the library, held by a test: imports point down, and only Keras is spoken."""

import ast
import fnmatch
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]

# A module may import its own room and rooms on lower floors. Rooms on one floor are strangers.
FLOORS = [
    {"keras_lowbit.checks"},
    {
        "keras_lowbit.named_outputs",
        "keras_lowbit.numerics",
        "keras_lowbit.paths",
        "keras_lowbit.progress",
        "keras_lowbit.optimizers",
        "keras_lowbit.weights_file",
        "keras_lowbit.whole_files",
    },
    {"keras_lowbit.scheme", "keras_lowbit.walk", "keras_lowbit.data"},
    {"keras_lowbit.quantizers", "keras_lowbit.regularizers"},
    {"keras_lowbit.layers"},
    {"keras_lowbit.kinds"},
    {"keras_lowbit.integer"},
    {"keras_lowbit.transform"},
    {
        "keras_lowbit.callbacks",
        "keras_lowbit.analysis",
        "keras_lowbit.distillation",
        "keras_lowbit.packed",
    },
    {"keras_lowbit.training", "keras_lowbit.tuning"},
    {"keras_lowbit.zoo", "tflite_export"},
    {"keras_lowbit.cli"},
    {"keras_lowbit.demo", "keras_lowbit_cli"},
]
# The public names are gathered in the root, so it lies above the library and below its users.
ROOT_MODULE = "keras_lowbit"
ABOVE_THE_ROOT = ("tflite_export", "keras_lowbit.cli", "keras_lowbit.demo", "keras_lowbit_cli")
BACKENDS = {"tensorflow", "jax", "torch"}
BACKEND_FILES = ("keras_lowbit/numerics/backend_*.py",)
LONGEST_FILE = 500
# Privates of Keras, PyTorch and LiteRT that have no public way: where to look when one changes.
PRIVATE = {
    ("keras_lowbit/walk.py", "_functional"),  # the graph behind a Sequential
    ("keras_lowbit/walk.py", "_nodes_by_depth"),  # the order of a graph's calls
    ("keras_lowbit/optimizers.py", "_trainable_variables"),  # in the order of momentums, averages
    ("keras_lowbit/optimizers.py", "_model_variables_moving_average"),
    ("keras_lowbit/optimizers.py", "_get_variable_index"),
    ("keras_lowbit/callbacks/resume.py", "_initial_epoch"),  # what BackupAndRestore leaves behind
    ("keras_lowbit/quantizers/switch.py", "_tracker"),  # variables of a built layer
    ("keras_lowbit/distillation/frozen.py", "_assert_same_dtype"),  # under mixed precision
    ("keras_lowbit/numerics/backend_torch.py", "_C"),
    ("keras_lowbit/numerics/backend_torch.py", "_are_functorch_transforms_active"),
    ("tflite_export/runtime.py", "_get_ops_details"),  # which kernels run an operation
}


def sources():
    """Every Python file of the two packages, relative to the repository."""
    tops = ("keras_lowbit", "keras_lowbit_cli", "tflite_export")
    files = (file for top in tops for file in (ROOT / top).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def module_name(path):
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """`(floor, name)` of the room that a module lies in, None outside of all rooms."""
    rooms = ((i, name) for i, floor in enumerate(FLOORS) for name in floor)
    return next((r for r in rooms if f"{module}.".startswith(f"{r[1]}.")), None)


def imported(tree):
    """`(line, dotted name)` of everything that is imported, also by a call with a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def import_violation(path, name):
    """Why `path` may not import `name`; None if it may."""
    top = name.split(".")[0]
    if not top:
        return "write absolute imports"
    if name == "keras.src" or name.startswith("keras.src."):
        return f"{name} is private to Keras"
    if top in BACKENDS:
        allowed = any(fnmatch.fnmatch(path, pattern) for pattern in BACKEND_FILES)
        return None if allowed else f"{name}: this library speaks keras.ops only"
    if top not in ("keras_lowbit", "keras_lowbit_cli", "tflite_export"):
        return None
    module = module_name(path)
    here, there = room(module), room(name)
    above = f"{module}.".startswith(tuple(f"{top}." for top in ABOVE_THE_ROOT))
    if there is None:
        if above or module == ROOT_MODULE:
            return None
        return f"{name}: import from the module that defines it, not from the root"
    if module == ROOT_MODULE:
        upward = f"{name}.".startswith(tuple(f"{top}." for top in ABOVE_THE_ROOT))
        return f"the root may not import {there[1]}" if upward else None
    if here is None or there == here or there[0] < here[0]:
        return None
    return f"{here[1]} may not import {there[1]}"


def private(name):
    return name.startswith("_") and not name.startswith("__")


def foreign_privates(texts):
    """`(path, name)` of every private attribute of an object whose class is not in these files."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    own = {path: {*_attributes(tree)} for path, tree in trees.items()}
    found = set()
    for path, tree in trees.items():
        elsewhere = set().union(*(names for other, names in own.items() if other != path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name, inherited = node.attr, ast.unparse(node.value) == "super()"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
                name, inherited = str(getattr(node.args[1], "value", "")), False
            else:
                continue
            # What a file calls by super() it may define, too, and yet it is somebody else's.
            ours = elsewhere if inherited else elsewhere | own[path]
            if private(name) and name not in ours:
                found.add((path, name))
    return found


def _attributes(tree):
    """Names that the classes of a file give their objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                yield getattr(part, "name", "")
                targets = getattr(part, "targets", [getattr(part, "target", None)])
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr


def violations(path, text):
    """Sentences about what is wrong in one file, `path:line: why`."""
    tree = ast.parse(text)
    found = []
    if room(module_name(path)) is None and module_name(path) != ROOT_MODULE:
        found.append((1, "this module has no floor: add it to FLOORS"))
    for line, name in imported(tree):
        why = import_violation(path, name)
        if why:
            found.append((line, why))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node.lineno, "raise an error instead of assert"))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "keras.src":
            found.append((node.lineno, "keras.src is private to Keras"))
    lines = text.count("\n") + 1
    if lines > LONGEST_FILE:
        found.append((lines, f"a file says one thing in {LONGEST_FILE} lines at most"))
    return [f"{path}:{line}: {why}" for line, why in found]


@pytest.mark.parametrize("path", sources())
def test_floors_hold_in(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_two_packages_are_found():
    assert {"keras_lowbit/__init__.py", "tflite_export/__init__.py"} <= set(sources())


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        (
            "keras_lowbit/numerics/grid.py",
            "from keras_lowbit.layers.conv import QuantizedConv2D",
            "keras_lowbit.numerics may not import keras_lowbit.layers",
        ),
        (
            "keras_lowbit/quantizers/lsq.py",
            "def late():\n    import keras_lowbit.transform.freeze",
            "keras_lowbit.quantizers may not import keras_lowbit.transform",
        ),
        (
            "keras_lowbit/transform/freeze.py",
            "from keras_lowbit import callbacks",
            "keras_lowbit.transform may not import keras_lowbit.callbacks",
        ),
        (
            "keras_lowbit/zoo/hub.py",
            "from tflite_export import convert",
            "keras_lowbit.zoo may not import tflite_export",
        ),
        (
            "keras_lowbit/layers/conv.py",
            "import keras_lowbit as klb",
            "keras_lowbit: import from the module that defines it, not from the root",
        ),
        (
            "keras_lowbit/__init__.py",
            "from keras_lowbit.cli import main",
            "the root may not import keras_lowbit.cli",
        ),
        (
            "keras_lowbit/layers/conv.py",
            "from keras.src import backend",
            "keras.src.backend is private to Keras",
        ),
        (
            "tflite_export/convert.py",
            "import keras\nkeras.src.ops",
            "keras.src is private to Keras",
        ),
        (
            "tflite_export/convert.py",
            "def late():\n    import tensorflow as tf",
            "tensorflow: this library speaks keras.ops only",
        ),
        (
            "keras_lowbit/numerics/uniform.py",
            "from jax import numpy as jnp",
            "jax.numpy: this library speaks keras.ops only",
        ),
        (
            "keras_lowbit/numerics/uniform.py",
            "import importlib\nimportlib.import_module('torch')",
            "torch: this library speaks keras.ops only",
        ),
        ("keras_lowbit/layers/conv.py", "from . import dense", "write absolute imports"),
        ("keras_lowbit/layers/conv.py", "assert True", "raise an error instead of assert"),
        (
            "keras_lowbit/layers/conv.py",
            "pass\n" * 500,
            "a file says one thing in 500 lines at most",
        ),
        (
            "keras_lowbit/attic.py",
            "",
            "this module has no floor: add it to FLOORS",
        ),
    ],
)
def test_a_planted_violation_is_caught(path, text, why):
    (sentence,) = violations(path, text)
    assert sentence.startswith(f"{path}:")
    assert sentence.endswith(f": {why}")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("keras_lowbit/numerics/backend_jax.py", "import jax\nfrom jax import numpy"),
        ("keras_lowbit/layers/conv.py", "import keras\nfrom keras import ops"),
        ("keras_lowbit/layers/conv.py", "from keras_lowbit.numerics.grid import IntGrid"),
        ("keras_lowbit/layers/conv.py", "from keras_lowbit.layers import product"),
        ("keras_lowbit/cli/main.py", "import keras_lowbit as klb\nimport tflite_export"),
        ("tflite_export/convert.py", "import keras_lowbit\nfrom ai_edge_litert import interpreter"),
        ("keras_lowbit/__init__.py", "from keras_lowbit import zoo\n__version__ = '1'"),
        ("keras_lowbit/layers/conv.py", "pass\n" * 499),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert violations(path, text) == []


def test_privates_of_others_are_the_known_ones():
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in sources()}
    assert foreign_privates(texts) == PRIVATE


@pytest.mark.parametrize(
    "planted",
    ["model._x", "super()._x()", "hasattr(model, '_x')", "model._x = 1", "class A:\n  y = b._x"],
)
def test_a_planted_private_is_caught(planted):
    own = "class Own:\n  def _mine(self):\n    self._z = self._mine()"
    assert foreign_privates({"a.py": planted, "b.py": own}) == {("a.py", "_x")}
    assert not foreign_privates({"a.py": planted.replace("_x", "_mine"), "b.py": own})
    assert not foreign_privates({"a.py": planted.replace("_x", "_z"), "b.py": own})
