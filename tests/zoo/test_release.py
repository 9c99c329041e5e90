"""Releasing a run: what is written, and what is refused with nothing written."""

import copy
import dataclasses
import hashlib
import json

import keras
import numpy as np
import pytest

import keras_lowbit as klb
import tflite_export
from keras_lowbit.cli.recipe import Data, Export, Model, Quantize, Recipe, Train
from keras_lowbit.zoo import load, registry
from tests.zoo.scripts import ZOO, script

pytestmark = [pytest.mark.once, pytest.mark.runtime]
FILE = "model_int8.tflite"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The script, with shelves of its own."""
    monkeypatch.syspath_prepend(str(ZOO))  # as when the script runs
    module = script("release")
    (tmp_path / "zoo").mkdir()
    monkeypatch.setattr(module, "EVIDENCE", tmp_path / "zoo")
    monkeypatch.setattr(registry, "RELEASED", tmp_path / "released")
    monkeypatch.setattr(registry, "INDEX", tmp_path / "released" / "index.json")
    return module


@pytest.fixture(scope="module")
def trained():
    """A tiny model and what its run measured, as `keras-lowbit train` notes it."""
    keras.utils.set_random_seed(3)
    image = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu")(keras.layers.Rescaling(1 / 255)(image))
    x = keras.layers.Dense(5, name="logits")(keras.layers.GlobalAveragePooling2D()(x))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 9, 9, 3)).astype("float32")
    model = klb.calibrate(klb.quantize_model(keras.Model(image, x), "w4a4"), pixels)
    content = tflite_export.convert(model).content
    recipe = Recipe(
        name="tiny",
        data=Data("/somewhere/noise.npz"),
        model=Model("tiny"),
        quantize=Quantize("w4a4"),
        train=Train(epochs=0),
        export=Export(weights=("int8",)),
    )
    scored = {"accuracy": 0.5, "interval": [0.25, 0.75], "images": 16}
    return model, {
        "accuracy": {"float": scored, "int8": scored},
        "backend": keras.backend.backend(),
        "data": "noise",
        "files": {
            FILE: {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "wrong_codes": 0,
                "compared_codes": 1000,
            }
        },
        "judged_on": "test images",
        "recipe": dataclasses.asdict(recipe),
        "train_seconds": 1.0,
        "versions": {},
    }


@pytest.fixture
def run(trained, tmp_path):
    """`run(change)`: a run's folder, its metrics changed by a function."""

    def made(change=lambda metrics: None):
        model, metrics = trained
        metrics = copy.deepcopy(metrics)
        change(metrics)
        folder = tmp_path / "run"
        folder.mkdir()
        model.save(folder / "model.keras")
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return made


def on_the_shelves(tmp_path):
    places = (tmp_path / "released", tmp_path / "zoo")
    return {p.relative_to(tmp_path).as_posix() for place in places for p in place.rglob("*.*")}


def test_a_release_is_a_checkpoint_its_evidence_and_an_entry(release, run, trained, tmp_path):
    entry = release.release(run(), "tiny_w4a4", "made by a test")
    evidence = {f"zoo/tiny_w4a4/{name}" for name in ("metrics.json", "probes.json", "README.md")}
    shelf = {"released/tiny_w4a4.keras", "released/index.json", "zoo/README.md"}
    assert on_the_shelves(tmp_path) == evidence | shelf
    assert registry.entries() == {"tiny_w4a4": entry}
    content = tflite_export.convert(load("tiny_w4a4")).content
    assert hashlib.sha256(content).hexdigest() == trained[1]["files"][FILE]["sha256"]
    metrics = json.loads((tmp_path / "zoo" / "tiny_w4a4" / "metrics.json").read_text())
    assert metrics["recipe"]["data"]["name"] == "noise.npz"
    assert metrics["latency"]["ms"]["int8"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(judged_on="held-out images"), "held-out images: train without --tune"),
        (lambda m: m["files"][FILE].update(wrong_codes=3), "3 wrong codes; such a model is not"),
        (
            lambda m: m["files"][FILE].update(wrong_codes=None),
            rf"run: not verified: {FILE}\. Train with \[export\] verify_images above 0",
        ),
        (lambda m: m["files"][FILE].update(sha256="0"), "the packed model gives another int8 file"),
    ],
    ids=["tuned", "wrong", "unverified", "another file"],
)
def test_a_run_is_refused_before_anything_is_written(release, run, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        release.release(run(change), "tiny_w4a4", "made by a test")
    assert on_the_shelves(tmp_path) == set()


def test_a_checkpoint_that_the_wheel_cannot_hold_is_not_written(
    release, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "SHIPPED_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"All checkpoints together take .* bytes, over 1,000"):
        release.release(run(), "tiny_w4a4", "made by a test")
    assert on_the_shelves(tmp_path) == set()


def test_a_full_disk_leaves_the_older_files(release, run, tmp_path, monkeypatch):
    folder = run()
    release.release(folder, "tiny_w4a4", "made by a test")
    before = {path: (tmp_path / path).read_bytes() for path in on_the_shelves(tmp_path)}

    def cut(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_bytes", cut)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written.*tiny_w4a4"):
        release.release(folder, "tiny_w4a4", "made again")
    assert {path: (tmp_path / path).read_bytes() for path in on_the_shelves(tmp_path)} == before
