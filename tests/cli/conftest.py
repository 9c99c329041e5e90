"""Small files for the commands, made once: a float, a quantized and an exported model of digits."""

import dataclasses
import math
import signal
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_lowbit import data, progress
from keras_lowbit_cli.main import main


@dataclasses.dataclass
class Outcome:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self):
        """The only line on stderr, which must be an error."""
        lines = [x for x in self.err.splitlines() if not x.startswith("INFO: Created TensorFlow")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture
def run(capsys, monkeypatch):
    """`run("inspect", path)` -> `Outcome`, in this process."""
    # What a command says must not depend on how fast the machine is.
    monkeypatch.setattr(progress, "SILENT_SECONDS", math.inf)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return call


@pytest.fixture
def ctrl_c():
    """SIGINT raises, as at a prompt; what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tiny_model():
    """Two products and a batch norm on 8x8 digits; takes raw pixels."""
    inputs = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Rescaling(1 / 255, name="pixels")(inputs)
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False, name="conv")(x)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Conv2D(6, 1, name="mix")(x)
    x = keras.layers.ReLU(name="relu2")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name="tiny")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with float.keras, w4a4.keras, w4a4.tflite and digits.npz; do not write there."""
    folder = tmp_path_factory.mktemp("made")
    keras.utils.set_random_seed(0)
    digits = data.load("digits")
    model = tiny_model()
    # Trained a little, so that classes and batch-norm statistics are no accidents of a start.
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    x, y = digits.x_train[:1024], digits.y_train[:1024]
    model.fit(x, y, batch_size=64, epochs=4, shuffle=False, verbose=0)
    model.save(folder / "float.keras")
    parts = {name: getattr(digits, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(folder / "digits.npz", **parts)
    source, model = str(folder / "float.keras"), str(folder / "w4a4.keras")
    quantize = ["quantize", source, "--scheme=w4a4", "--data=digits", "--images=64"]
    assert main([*quantize, f"--out={model}"]) == 0
    assert main(["export", model, f"--out={folder / 'w4a4.tflite'}", "--verify_images=4"]) == 0
    return folder


@pytest.fixture
def recipe(made, tmp_path):
    """`recipe(train={...}, ...)` writes a TOML recipe of the tiny model; its path."""

    def write(name="tiny", **sections):
        settings = {
            "data": {"name": "digits", "holdout": 100},
            "model": {"architecture": str(made / "float.keras")},
            "quantize": {"scheme": "w4a4", "calibration_images": 64},
            "train": {"epochs": 3, "batch_size": 128, "flip": False, "shift": 1},
            "export": {"weights": ["int8"], "verify_images": 4},
        }
        for section, values in sections.items():
            settings.setdefault(section, {}).update(values)
        settings["train"].setdefault("xla", "off")
        path = tmp_path / f"{name}.toml"
        path.write_text(
            "\n".join(
                f"[{section}]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in values.items())
                for section, values in settings.items()
            )
        )
        return path

    return write


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {_toml(v)}' for k, v in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)
