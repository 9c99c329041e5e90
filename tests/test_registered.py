"""What a saved model may hold is known to Keras behind `import keras_lowbit` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lowbit as klb

FRESH = """
import keras, keras_lowbit
known = set(keras.saving.get_custom_objects())
import importlib, pkgutil
for found in pkgutil.walk_packages(keras_lowbit.__path__, "keras_lowbit."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
names = sorted(keras.saving.get_custom_objects())
print([name for name in names if name.startswith("keras_lowbit>")])
print([name for name in names if name not in known])
"""
LOAD = """
import sys
import keras, keras_lowbit
import numpy as np
model = keras.models.load_model(sys.argv[1])
print(keras.ops.convert_to_numpy(model(np.load(sys.argv[2]))).tobytes().hex())
"""


def in_a_fresh_process(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.once
def test_the_import_registers_every_class_of_the_library():
    every, late = map(ast.literal_eval, in_a_fresh_process(FRESH)[-2:])
    root = Path(klb.__file__).parent
    marks = sum(text.read_text().count("@keras.saving.register_") for text in root.rglob("*.py"))
    assert len(every) == marks
    assert late == []


def test_a_quantized_model_loads_in_a_process_that_imported_the_library_alone(tmp_path):
    inputs = keras.Input((6, 6, 3))
    hidden = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(hidden))
    model = klb.quantize_model(keras.Model(inputs, outputs), "w4a4")
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("float32")
    klb.calibrate(model, x)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    (got,) = in_a_fresh_process(LOAD, tmp_path / "model.keras", tmp_path / "x.npy")[-1:]
    assert bytes.fromhex(got) == keras.ops.convert_to_numpy(model(x)).tobytes()
