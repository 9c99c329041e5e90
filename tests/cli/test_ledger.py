"""A finished float model is kept: by the job that goes on, and by one that begins with it."""

import json
import shutil

import keras
import numpy as np
import pytest

from keras_lowbit.cli import files
from keras_lowbit.cli.ledger import Stages, alone_in

pytestmark = pytest.mark.runtime


def weights_of(folder):
    return files.load_model(folder / "model.keras").get_weights()


def begun(finished, folder):
    """A folder as a run leaves it that was killed behind its float model."""
    folder.mkdir()
    shutil.copy(finished / "float.keras", folder)
    found = json.loads((finished / "stages.json").read_text())
    found["done"] = {"float": found["done"]["float"]}
    (folder / "stages.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def dropping(tmp_path):
    """A file of an untrained net that drops features."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 255)(inputs)  # or it would learn nothing
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(x)
    x = keras.layers.Dropout(0.4)(keras.layers.Flatten()(x))
    keras.Model(inputs, keras.layers.Dense(10)(x)).save(tmp_path / "net.keras")
    return tmp_path / "net.keras"


def test_dropout_drops_the_same_where_a_run_goes_on_behind_its_float_model(
    run, recipe, tmp_path, dropping
):
    path = recipe(
        model={"architecture": str(dropping)},
        pretrain={"epochs": 1, "xla": "off"},
        train={"epochs": 1},
    )
    assert run("train", path, "--out", tmp_path / "whole").code == 0
    folder = begun(tmp_path / "whole", tmp_path / "killed")
    assert run("train", path, "--out", folder).code == 0
    for a, b in zip(weights_of(tmp_path / "whole"), weights_of(folder), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mended_recipe_begins_behind_the_float_model(run, recipe, tmp_path):
    given = {"pretrain": {"epochs": 1, "xla": "off"}, "train": {"epochs": 1}}
    assert run("train", recipe(**given), "--out", tmp_path / "whole").code == 0
    folder = begun(tmp_path / "whole", tmp_path / "begun")
    before = (folder / "float.keras").read_bytes()
    mended = recipe(**given, quantize={"scheme": "w4a8"})
    assert run("train", mended, "--out", folder).code == 0
    assert (folder / "float.keras").read_bytes() == before
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["recipe"]["quantize"]["scheme"] == "w4a8"
    # Now it holds more than a float model.
    outcome = run("train", recipe(**given), "--out", folder)
    assert (outcome.code, "results of another recipe" in outcome.err) == (2, True)


@pytest.mark.parametrize("job", [{"x": 1}, {"recipe": 3}, {"recipe": {"train": None}}])
def test_a_ledger_of_something_else_is_told_from_a_start(job, tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({"job": job, "done": {}}))
    with pytest.raises(ValueError, match="results of another recipe"):
        Stages(tmp_path, {"recipe": {"data": 1, "train": {"seed": 0}}})


@pytest.mark.parametrize("begin", ["another float model", "a student"])
def test_what_a_mended_recipe_would_lose_or_mistake_is_refused(run, recipe, tmp_path, begin):
    given = {"pretrain": {"epochs": 1, "xla": "off"}, "train": {"epochs": 1}}
    assert run("train", recipe(**given), "--out", tmp_path / "whole").code == 0
    folder = begun(tmp_path / "whole", tmp_path / "begun")
    if begin == "a student":
        (folder / "backup_model").mkdir()
        mended = recipe(**given, quantize={"scheme": "w4a8"})
    else:
        mended = recipe(pretrain={"epochs": 2, "xla": "off"}, train={"epochs": 1})
    outcome = run("train", mended, "--out", folder)
    assert (outcome.code, "results of another recipe" in outcome.err) == (2, True)


TRAINED = {"pretrain": {"epochs": 1, "xla": "off"}, "train": {"epochs": 1}}
MODELS = ("float.keras", "model.keras")


def test_another_export_keeps_what_was_trained(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    path = recipe(**TRAINED, export={"weights": ["int8", "int4"]})
    assert run("train", path, "--out", out).code == 0
    models = [(out / name).read_bytes() for name in MODELS]
    stages = json.loads((out / "stages.json").read_text())
    measured = {name: dict(stages["done"][name]) for name in ("accuracy_int8", "accuracy_frozen")}
    for name in ("accuracy_float", "accuracy_quantized", *measured):
        stages["done"][name]["right"] = -1  # what is kept is told from what is made again
    (out / "stages.json").write_text(json.dumps(stages))

    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", lambda *a, **k: pytest.fail("trains"))
    export = {"weights": ["int8"], "input_type": "int8", "output_type": "int8"}
    assert run("train", recipe(**TRAINED, export=export), "--out", out).code == 0
    assert [(out / name).read_bytes() for name in MODELS] == models
    after = json.loads((out / "stages.json").read_text())
    kept = ("float", "model", "accuracy_float", "accuracy_quantized")
    assert {name: after["done"][name] for name in kept} == {n: stages["done"][n] for n in kept}
    assert after["done"].keys() == {*kept, *measured, "file_int8"}
    for name, scores in measured.items():
        assert after["done"][name]["right"] == scores["right"]
    assert after["done"]["file_int8"]["sha256"] != stages["done"]["file_int8"]["sha256"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["recipe"]["export"]["output_type"] == "int8"
    assert list(metrics["files"]) == ["model_int8.tflite"]
    assert (out / "model_int4.tflite").is_file()  # of before: nothing is lost


def test_a_mended_export_goes_on_behind_the_trained_model(run, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tflite_export.check", lambda *a, **k: [])  # as if it knew less
        export = {"target": "coral", "weights": ["int8", "int4"]}
        outcome = run("train", recipe(**TRAINED, export=export), "--out", out)
        assert (outcome.code, "use weights='int8'" in outcome.err) == (2, True)
    models = [(out / name).read_bytes() for name in MODELS]
    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", lambda *a, **k: pytest.fail("trains"))
    mended = recipe(**TRAINED, export={"target": "coral", "weights": ["int8"]})
    assert run("train", mended, "--out", out).code == 0
    assert [(out / name).read_bytes() for name in MODELS] == models


def test_beside_another_export_what_makes_a_run_another_one_is_named(run, recipe, tmp_path):
    out = tmp_path / "out"
    assert run("train", recipe(train={"epochs": 0}), "--out", out).code == 0
    other = recipe(train={"epochs": 0}, export={"output_type": "int8"})
    said = run("train", other, "--out", out, "--tune").error
    assert "(tune: False, now True)" in said


@pytest.fixture
def own_data(made, tmp_path):
    """A copy of the digits; `own_data(part=change)` writes it again with a part changed."""
    path = tmp_path / "own.npz"

    def write(**changes):
        with np.load(made / "digits.npz") as stored:
            parts = dict(stored)
        for name, change in changes.items():
            change(parts[name])
        np.savez(path, **parts)
        return path

    return write


@pytest.mark.parametrize("part", ["x_train", "y_train", "x_test", "y_test"])
def test_results_of_other_data_of_the_same_name_are_refused(run, recipe, own_data, tmp_path, part):
    path = recipe(data={"name": str(own_data())}, train={"epochs": 0})
    assert run("train", path, "--out", tmp_path / "out").code == 0
    assert run("train", path, "--out", tmp_path / "out").code == 0

    def other(array):
        array[-1] = (array[-1] + 1) % 10

    own_data(**{part: other})
    said = run("train", path, "--out", tmp_path / "out").error
    assert "holds results of another recipe, backend, data or weights (contents.data: " in said


def test_results_of_other_weights_of_the_same_name_are_refused(run, recipe, made, tmp_path):
    source = tmp_path / "net.keras"
    shutil.copy(made / "float.keras", source)
    path = recipe(model={"architecture": str(source)}, train={"epochs": 0})
    assert run("train", path, "--out", tmp_path / "out").code == 0
    model = files.load_model(source)
    model.layers[-1].bias.assign_add(np.ones(10))
    model.save(source)
    assert "(contents.architecture: " in run("train", path, "--out", tmp_path / "out").error


def test_a_folder_in_which_a_run_is_at_work_is_refused(run, recipe, tmp_path):
    pytest.importorskip("fcntl")
    path, out = recipe(train={"epochs": 0}), tmp_path / "out"
    with alone_in(out):
        assert f"Another run is at work in {out}" in run("train", path, "--out", out).error
    assert run("train", path, "--out", out).code == 0


def test_a_run_that_ends_while_another_begins_lets_no_third_in(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, ended = fcntl.flock, []

    def late(file, how):
        if not ended:  # the first run ends between the second's opening and locking of the file
            ended.append((tmp_path / ".lock").unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        alone_in(tmp_path),
        pytest.raises(ValueError, match="Another run is at work"),
        alone_in(tmp_path),
    ):
        pytest.fail("two runs are in one folder")
    assert not (tmp_path / ".lock").exists()


def test_a_folder_whose_job_names_quantizers_in_capitals_goes_on(tmp_path):
    job = {"recipe": {"quantize": {"kernel": "lsq", "activation": "lsq"}}}
    before = {"job": {"recipe": {"quantize": {"kernel": "LSQ", "activation": "Lsq"}}}, "done": {}}
    (tmp_path / "stages.json").write_text(json.dumps(before))
    assert Stages(tmp_path, job).found["job"] == job
