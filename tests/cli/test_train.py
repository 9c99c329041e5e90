"""`keras-lowbit train`: results, resuming, and what a folder protects."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import Resume
from keras_lowbit.cli import files, fitting
from keras_lowbit.cli.recipe import Train
from keras_lowbit.tuning import Rates, reconstruct, refine

pytestmark = pytest.mark.runtime

DESCENT = {"train": {"bit_descent": {"0": 8, "1": 6, "2": 4}}}


def weights_of(path):
    return [np.asarray(w) for w in files.load_model(path).get_weights()]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_train_writes_models_files_history_and_metrics(run, recipe, tmp_path):
    path = recipe(pretrain={"epochs": 1, "xla": "off"}, **DESCENT)
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    wanted = {"float.keras", "model.keras", "model_int8.tflite", "history.csv", "metrics.json"}
    assert names == wanted | {"history_float.csv", "stages.json"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["accuracy"]) == {"float", "quantized", "frozen", "int8"}
    through_file, frozen = metrics["accuracy"]["int8"], metrics["accuracy"]["frozen"]
    assert through_file["right"] == frozen["right"]
    low, high = through_file["interval"]
    assert 0 <= low < through_file["accuracy"] < high <= 1
    assert (through_file["images"], metrics["judged_on"]) == (360, "test images")
    file = metrics["files"]["model_int8.tflite"]
    assert (file["wrong_codes"], file["verify_images"]) == (0, 4)
    assert file["bytes"] == (tmp_path / "out" / "model_int8.tflite").stat().st_size
    assert [row["epoch"] for row in metrics["history"]] == [0, 1, 2]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} < set(metrics["history"][0])
    assert metrics["backend"] == keras.backend.backend()
    assert metrics["versions"]["keras"] == keras.__version__
    assert metrics["recipe"]["train"]["bit_descent"] == {"0": 8, "1": 6, "2": 4}


def test_cut_and_mixed_images_train_with_a_teacher_and_without(run, recipe, tmp_path):
    losses = []
    for name, more in (("plain", {}), ("taught", {"distill": 0.5})):
        train = {"epochs": 1, "cutout": 3, "mixup": 0.5, **more}
        path = recipe(data={"holdout": 128}, train=train)
        assert run("train", path, "--out", tmp_path / name).code == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        (row,) = metrics["history"]
        losses.append(row["loss"])
        # Held-out images stay as they are, with probabilities for labels: accuracy is of classes.
        assert (row["val_accuracy"] * 128) % 1 == pytest.approx(0, abs=1e-3)
        assert metrics["files"]["model_int8.tflite"]["wrong_codes"] == 0
    assert np.isfinite(losses).all()


def test_block_reconstruction_comes_before_training(run, recipe, tmp_path, monkeypatch):
    out, seen, rates = tmp_path / "out", [], []

    def watched(model, teacher, images, **given):
        seen.append((len(images), given["memory"], given["logit_weight"], given["match_means"]))
        rates.append((given["rates"], given["block_rates"]))
        return reconstruct(model, teacher, images, **given)

    def watched_whole(model, teacher, images, **given):
        seen.append((len(images), given["steps"], given["batch_size"]))
        rates.append(given["rates"])
        return refine(model, teacher, images, **given)

    monkeypatch.setattr("keras_lowbit.cli.trainer.reconstruct", watched)
    monkeypatch.setattr("keras_lowbit.cli.trainer.refine", watched_whole)
    path = recipe(
        model={"fold": True},
        pretrain={"epochs": 1, "xla": "off"},
        reconstruct={
            "steps": 3,
            "block_steps": {"*": 2},
            "batch_size": 8,
            "images": 32,
            "views": 1,
            "memory": 0.25,
            "logit_weight": 0.5,
            "match_means": True,
            "rates": {"biases": 0.5},
            "block_rates": {"*": {"log_scales": 0.1}},
        },
        refine={"steps": 2, "batch_size": 8, "rates": {"biases": 0.25}},
        train={"epochs": 0},
    )
    outcome = run("train", path, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "error before" in outcome.out
    assert seen == [(64, 2**28, 0.5, True), (64, 2, 8)]  # each image and one view of it
    whole = Rates(codes_4bit=0, codes_8bit=0, biases=0.25, log_scales=6e-4)
    assert rates == [(Rates(biases=0.5), {"*": Rates(biases=0.5, log_scales=0.1)}), whole]
    assert not (out / "blocks").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    kinds = {type(layer).__name__ for layer in files.load_model(out / "model.keras").layers}
    assert "BatchNormalization" not in kinds
    assert metrics["files"]["model_int8.tflite"]["wrong_codes"] == 0
    assert 0 < metrics["accuracy"]["int8"]["float_agreement"] <= 1
    calibrated = recipe(model={"fold": True}, pretrain={"epochs": 1, "xla": "off"}, train={})
    assert run("train", calibrated, "--out", tmp_path / "calibrated", "--epochs=0").code == 0
    one, other = (weights_of(tmp_path / name / "model.keras") for name in ("out", "calibrated"))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_a_finished_run_is_left_as_it_is(run, recipe, tmp_path, contents, monkeypatch):
    path, out = recipe(), tmp_path / "out"
    assert run("train", path, "--out", out, "--epochs=1").code == 0
    before = contents(out)
    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", lambda *a, **k: pytest.fail("trains"))
    assert run("train", path, "--out", out, "--epochs=1").code == 0
    assert contents(out) == before


@pytest.mark.parametrize("gone", ["float.keras", "model.keras"])
def test_results_of_a_model_that_is_gone_are_not_those_of_the_next(
    run, recipe, tmp_path, monkeypatch, gone
):
    out = tmp_path / "out"
    path = recipe(pretrain={"epochs": 1, "xla": "off"}, train={"epochs": 1})
    assert run("train", path, "--out", out).code == 0
    before = json.loads((out / "stages.json").read_text())["done"]
    # As if the first run had made another model: results that the next one must not take over.
    stages = json.loads((out / "stages.json").read_text())
    for name in ("accuracy_quantized", "accuracy_frozen", "accuracy_int8"):
        stages["done"][name]["right"] = -1
    (out / "stages.json").write_text(json.dumps(stages))
    (out / "model_int8.tflite").write_bytes(b"of another model")
    (out / gone).unlink()
    known = []

    def watched(*arguments, **options):
        known.append(set(json.loads((out / "stages.json").read_text())["done"]))
        return fitting.fit(*arguments, **options)

    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", watched)
    assert run("train", path, "--out", out).code == 0
    assert known == ([set(), {"float"}] if gone == "float.keras" else [{"float"}])
    after = json.loads((out / "stages.json").read_text())["done"]
    for name in ("accuracy_float", "accuracy_quantized", "accuracy_frozen", "accuracy_int8"):
        assert after[name] == before[name]
    assert after["file_int8"] == before["file_int8"]
    content = (out / "model_int8.tflite").read_bytes()
    assert hashlib.sha256(content).hexdigest() == after["file_int8"]["sha256"]


def test_a_file_that_is_not_the_one_measured_is_written_anew(run, recipe, tmp_path):
    path, out = recipe(), tmp_path / "out"
    assert run("train", path, "--out", out, "--epochs=0").code == 0
    file = out / "model_int8.tflite"
    whole, metrics = file.read_bytes(), (out / "metrics.json").read_text()
    file.write_bytes(whole[:3000])
    assert run("train", path, "--out", out, "--epochs=0").code == 0
    assert file.read_bytes() == whole
    assert (out / "metrics.json").read_text() == metrics


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.csv", b"epoch,loss\nfoo,1.5\n"),
        ("history.csv", b"loss\n1.5\n"),
        ("history.csv", b"\xff\xfe"),
        ("history_float.csv", b"loss\n1.5\n"),
        ("stages.json", b'{"done": {}}'),
        ("stages.json", b'{"job": 3, "done": {}}'),
        ("stages.json", b"[]"),
    ],
)
def test_damaged_files_of_a_run_are_named(run, recipe, tmp_path, name, content):
    path, out = recipe(), tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(content)
    outcome = run("train", path, "--out", out, "--epochs=0")
    assert outcome.code == 2
    assert f"{name} is damaged" in outcome.error
    assert outcome.error.rstrip().endswith("Remove it")
    assert {path.name for path in out.iterdir()} <= {name, ".lock"}, "found before any work"


def test_snapshots_that_a_kill_left_behind_go(run, recipe, tmp_path):
    path, out = recipe(pretrain={"epochs": 1, "xla": "off"}), tmp_path / "out"
    assert run("train", path, "--out", out, "--epochs=1").code == 0
    left = [out / "backup_float", out / "backup_model", out / "blocks"]
    for folder in left:
        folder.mkdir()
    assert run("train", path, "--out", out, "--epochs=1").code == 0
    assert not any(folder.exists() for folder in left)
    # A student of the float model before must not go on as one of the next.
    (out / "float.keras").unlink()
    (out / "backup_model").mkdir()
    (out / "backup_model" / "junk").write_text("of another student")
    assert run("train", path, "--out", out, "--epochs=1").code == 0
    assert not (out / "backup_model").exists()


def test_blocks_that_were_finished_before_a_kill_are_not_done_again(
    run, recipe, tmp_path, monkeypatch
):
    path, out, found = (
        recipe(
            pretrain={"epochs": 1, "xla": "off"},
            reconstruct={"steps": 2, "batch_size": 8, "images": 16},
            train={"epochs": 0},
        ),
        tmp_path / "out",
        [],
    )

    def killed(model, teacher, images, *, folder, **given):
        reconstruct(model, teacher, images, folder=folder, **given)
        raise KeyboardInterrupt

    def watched(model, teacher, images, *, folder, **given):
        found.extend(sorted(file.name for file in folder.iterdir()))
        return reconstruct(model, teacher, images, folder=folder, **given)

    monkeypatch.setattr("keras_lowbit.cli.trainer.reconstruct", killed)
    assert run("train", path, "--out", out).code != 0
    monkeypatch.setattr("keras_lowbit.cli.trainer.reconstruct", watched)
    assert run("train", path, "--out", out).code == 0
    assert found[0] == "block_000.npz"


def test_a_folder_of_another_recipe_is_refused_and_untouched(run, recipe, tmp_path, contents):
    path, out = recipe(), tmp_path / "out"
    assert run("train", path, "--out", out, "--epochs=0").code == 0
    before = contents(out)
    outcome = run("train", path, "--out", out, "--epochs=0", "--seed=3")
    assert outcome.code == 2
    assert "pretrain.seed: 0, now 3" in outcome.error
    assert contents(out) == before


def test_a_run_that_broke_off_goes_on_to_the_same_weights_and_history(
    run, recipe, tmp_path, monkeypatch
):
    path = recipe(**DESCENT)
    assert run("train", path, "--out", tmp_path / "whole").code == 0

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 15:  # ten steps an epoch
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        kill = lambda *a, **k: [Kill(), Resume(*a, **k)]  # noqa: E731
        patched.setattr(fitting, "Resume", lambda *a, **k: _Both(kill(*a, **k)))
        outcome = run("train", path, "--out", tmp_path / "cut")
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert len(fitting.read_history(tmp_path / "cut" / "history.csv")) == 1
    assert run("train", path, "--out", tmp_path / "cut").code == 0
    assert_equal(*(weights_of(tmp_path / name / "model.keras") for name in ("whole", "cut")))
    one, two = ((tmp_path / n / "history.csv").read_text() for n in ("whole", "cut"))
    assert one == two
    assert not (tmp_path / "cut" / "backup_model").exists()


class _Both(keras.callbacks.CallbackList):
    """Two callbacks in the place of one."""

    def __init__(self, both):
        super().__init__(both)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_files(recipe, tmp_path):
    path = recipe(**DESCENT)
    command = [sys.executable, "-m", "keras_lowbit_cli", "train", str(path)]
    for name in ("whole", "cut"):
        process = subprocess.Popen(
            [*command, f"--out={tmp_path / name}"], stdout=subprocess.PIPE, text=True
        )
        if name == "cut":
            next(line for line in process.stdout if line.startswith("Epoch 2/"))
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, f"--out={tmp_path / 'cut'}"], check=True, capture_output=True)
    assert_equal(*(weights_of(tmp_path / name / "model.keras") for name in ("whole", "cut")))
    files_ = [(tmp_path / name / "model_int8.tflite").read_bytes() for name in ("whole", "cut")]
    assert files_[0] == files_[1]


def test_distillation_trains_the_student_with_descent_guard_and_resume(run, recipe, tmp_path, made):
    sections = {"train": {**DESCENT["train"], "distill": 0.5, "temperature": 2.0}}
    out = tmp_path / "out"
    assert run("train", recipe(**sections), "--out", out).code == 0
    start, end = weights_of(made / "w4a4.keras"), weights_of(out / "model.keras")
    assert any((a != b).any() for a, b in zip(start, end, strict=True))
    history = fitting.read_history(out / "history.csv")
    assert {"distillation_loss", "student_loss", "val_accuracy"} < set(history[0])
    kernel = files.load_model(out / "model.keras").get_layer("mix").kernel_quantizer
    assert kernel.bits == 4


def test_the_distilled_loss_is_the_mixture_that_the_recipe_promises(made):
    from keras_lowbit import calibrate, quantize_model

    teacher = files.load_model(made / "float.keras")
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype("float32")
    y = np.arange(16) % 10
    student = calibrate(quantize_model(teacher, "w2a2"), x)
    train = Train(epochs=1, distill=0.25, temperature=2.0)
    learner = fitting.distiller(teacher, student, train)
    learner.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = learner.compute_loss(x=x, y=y, y_pred=student(x), training=False)
    found = float(ops.convert_to_numpy(loss))

    def log_softmax(model, temperature):
        logits = ops.convert_to_numpy(model(x)).astype("float64") / temperature
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    entropy = -log_softmax(student, 1)[np.arange(16), y].mean()
    t, s = log_softmax(teacher, 2), log_softmax(student, 2)
    divergence = (np.exp(t) * (t - s)).sum(-1).mean()
    assert divergence > 1e-4
    assert found == pytest.approx(0.75 * entropy + 0.25 * 4 * divergence, rel=1e-4)


def test_the_teacher_of_a_recipe_has_its_batch_norms_folded_and_the_same_logits():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(3, 3, use_bias=False)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization()(x))
    teacher = keras.Model(inputs, keras.layers.Dense(4)(x))
    teacher.layers[2].moving_variance.assign(np.float32([0.1, 2.0, 9.0]))
    learner = fitting.distiller(teacher, teacher, Train(epochs=1, distill=0.5))
    kinds = {type(layer).__name__ for layer in learner.teacher.layers}
    assert "BatchNormalization" not in kinds
    assert not learner.teacher.trainable_variables
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    # Float32 rounding of products of three kernels.
    np.testing.assert_allclose(
        ops.convert_to_numpy(learner.teacher(x)), ops.convert_to_numpy(teacher(x)), atol=1e-5
    )


def stubborn(made, tmp_path, digit=3, classes=10):
    """File of a float model that always says one digit."""
    body = files.load_model(made / "float.keras")
    features = body.layers[-1].input
    head = keras.layers.Dense(classes, kernel_initializer="zeros", name="always")
    model = keras.Model(body.input, head(features))
    head.bias.assign(12.0 * np.eye(classes, dtype="float32")[digit])
    path = tmp_path / f"always_{digit}_of_{classes}.keras"
    model.save(path)
    return path


@pytest.mark.parametrize("scheme", ["", "w4a4"])
def test_another_teacher_than_the_float_model_is_what_a_recipe_distills_from(
    run, recipe, tmp_path, made, scheme
):
    path = recipe(
        quantize={"scheme": scheme},
        train={
            "epochs": 2,
            "learning_rate": 0.05,
            "distill": 1.0,
            "teacher": str(stubborn(made, tmp_path)),
        },
        export={"weights": []},
    )
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype("float32")
    logits = files.load_model(tmp_path / "out" / "model.keras")(pixels)
    assert (ops.convert_to_numpy(logits).argmax(-1) == 3).all()


def test_teachers_that_cannot_teach_are_refused_before_anything_is_trained(
    run, recipe, tmp_path, made
):
    for teacher, message in (
        (stubborn(made, tmp_path, classes=7), "gives (None, 7); the student takes"),
        (made / "w4a4.keras", "w4a4.keras is quantized; give a float model"),
        ("resnet21_cifar100", "No released model 'resnet21_cifar100'. Did you mean"),
        (tmp_path / "none.keras", "no such file"),
    ):
        path = recipe(train={"epochs": 1, "distill": 0.5, "teacher": str(teacher)})
        outcome = run("train", path, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert message in outcome.error
        assert not (tmp_path / "out").exists()


def test_distillation_needs_logits(run, recipe, tmp_path, made):
    model = files.load_model(made / "float.keras")
    outputs = keras.layers.Softmax(name="probabilities")(model.output)
    keras.Model(model.input, outputs).save(tmp_path / "soft.keras")
    path = recipe(model={"architecture": str(tmp_path / "soft.keras")}, train={"distill": 0.5})
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "distill needs a model that ends in logits" in outcome.err


def test_tuning_leaves_the_test_images_alone(run, recipe, tmp_path):
    out = tmp_path / "out"
    assert run("train", recipe(), "--out", out, "--epochs=0", "--tune").code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["judged_on"] == "held-out images"
    assert {s["images"] for s in metrics["accuracy"].values()} == {100}


def test_a_float_recipe_makes_a_float_model(run, recipe, tmp_path):
    out = tmp_path / "out"
    path = recipe(quantize={"scheme": ""}, train={"epochs": 1})
    assert run("train", path, "--out", out).code == 0
    assert files.kind(files.load_model(out / "model.keras")) == "float"
    metrics = json.loads((out / "metrics.json").read_text())
    assert (set(metrics["accuracy"]), metrics["files"]) == ({"float"}, {})


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"model": {"architecture": "resnet9"}}, "Did you mean"),
        ({"model": {"weights": "no.h5"}}, "no.h5: no such file of weights"),
        ({"data": {"name": "digit"}}, "Did you mean 'digits'?"),
        ({"data": {"holdout": 2000}}, "must hold 1..1436"),
        ({"train": {"batch_size": 4000}}, "tiny [train]: batch_size must be at most 1337"),
        (
            {"pretrain": {"epochs": 1, "batch_size": 4000}},
            "tiny [pretrain]: batch_size must be at most 1337, the number of training images",
        ),
        ({"quantize": {"kernel_options": {"foo": 1}}}, "tiny [quantize]: "),
        ({"quantize": {"exceptions": {"nosuch*": "w8a8"}}}, "tiny [quantize]: Scheme patterns"),
        (
            {"quantize": {"scheme": "w8a8"}, "train": {"bit_descent": {"1": 3}}},
            "tiny [train]: BitDescent: tiny_quantized has no quantizer",
        ),
        (
            {"train": {"bit_descent": {"0": 8, "1": 2}}},
            "tiny [train]: BitDescent: the plan goes down to 2 bits",
        ),
    ],
)
def test_a_run_that_cannot_work_ends_before_training(run, recipe, tmp_path, sections, why):
    outcome = run("train", recipe(**sections), "--out", tmp_path / "out")
    assert outcome.code == 2
    assert why in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_net_of_several_outputs_is_refused_before_training(run, recipe, tmp_path, made):
    model = files.load_model(made / "float.keras")
    outputs = [model.output, keras.layers.Dense(10)(model.output)]
    keras.Model(model.input, outputs).save(tmp_path / "two.keras")
    path = recipe(model={"architecture": str(tmp_path / "two.keras")})
    outcome = run("train", path, "--out", tmp_path / "out")
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert outcome.error.startswith("tiny [model]: ")
    assert "accuracy is of one output (batch, classes)" in outcome.error


def test_images_of_one_class_are_refused_before_training(run, recipe, tmp_path, made):
    digits = dict(np.load(made / "digits.npz"))
    same = {k: np.zeros_like(v) if k.startswith("y") else v for k, v in digits.items()}
    np.savez(tmp_path / "same.npz", **same)
    path = recipe(model={"architecture": "resnet8"}, train={"epochs": 1})
    outcome = run("train", path, "--data", tmp_path / "same.npz", "--out", tmp_path / "out")
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert "resnet8 has 1 output and same.npz 1 classes; accuracy is counted by" in outcome.error


def test_paths_of_recipes_and_flags_begin_in_the_home_folder(
    run, made, recipe, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("float.keras", "digits.npz"):
        shutil.copy(made / name, home)
    recipe(
        name="home/tiny",
        data={"name": "~/digits.npz"},
        model={"architecture": "~/float.keras", "weights": "~/float.keras"},
        train={"epochs": 1, "distill": 0.5, "teacher": "~/float.keras"},
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    outcome = run("train", "~/tiny.toml", "--out=~/runs/x")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((home / "runs" / "x" / "metrics.json").read_text())
    assert set(metrics["contents"]) == {"data", "architecture", "weights", "teacher"}
    assert metrics["recipe"]["model"]["weights"] == "~/float.keras"  # a home that moves
    again = run("train", "~/tiny.toml", "--out=~/runs/y", "--weights=~/float.keras", "--epochs=1")
    assert again.code == 0, again.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_without_stdout_a_recipe_is_trained(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("train", recipe(), "--out", tmp_path / "out", "--epochs=1").code == 0
    assert (tmp_path / "out" / "model_int8.tflite").is_file()
    assert sys.stdout is None


def test_a_folder_of_mixed_sizes_asks_for_the_size_of_the_recipe(run, recipe, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for side in (8, 9):
        folder = tmp_path / "images" / f"{side} wide"
        folder.mkdir(parents=True)
        for i in range(5):
            image.new("L", (side, 8)).save(folder / f"{i}.png")
    path = recipe()
    outcome = run("train", path, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert outcome.error.startswith("tiny [data]: ")
    assert "in a recipe [data] size" in outcome.error


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_later(run, recipe, tmp_path, small_disk):
    path, out = recipe(), tmp_path / "out"
    with small_disk(6000):
        outcome = run("train", path, "--out", out, "--epochs=0")
    assert outcome.code == 2
    assert f"error: {out / 'model.keras'}: File too large; nothing was written" in outcome.err
    assert not (out / "model.keras").exists()
    assert run("train", path, "--out", out, "--epochs=0").code == 0


def test_depthwise_nets_are_not_compiled_by_xla_on_tensorflow(backend):
    def net(layer):
        return keras.Sequential([keras.Input((4, 4, 2)), keras.Sequential([layer])])

    plain = net(keras.layers.Conv2D(2, 3))
    for layer in (keras.layers.DepthwiseConv2D(3), keras.layers.SeparableConv2D(2, 3)):
        on_tensorflow = backend == "tensorflow"
        assert fitting.jit_compile_for(net(layer)) == (False if on_tensorflow else "auto")
        assert fitting.jit_compile_for(net(layer), "on") == (True if on_tensorflow else "auto")
    assert fitting.jit_compile_for(plain) == "auto"


def test_history_has_one_row_an_epoch_and_numbers_that_read_back(tmp_path):
    history = fitting.HistoryFile(tmp_path / "h.csv")
    third = float(np.float32(1 / 3))
    for epoch, loss in ((0, 1.0), (1, third), (2, 0.1), (1, 0.25)):
        history.on_epoch_end(epoch, {"loss": loss})
    rows = fitting.read_history(tmp_path / "h.csv")
    assert rows == [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.25}]
    history.on_epoch_end(2, {"loss": third, "val_loss": 2.0})
    assert fitting.read_history(tmp_path / "h.csv")[2]["loss"] == third


@pytest.mark.parametrize(
    ("quantize", "why"),
    [
        ({"kernel": "affine"}, "tiny [quantize]: "),
        ({"exceptions": {"nosuch*": "w8a8"}}, "nosuch"),
        ({"exceptions": {"mix": "float"}}, "mix stayed float"),
    ],
)
def test_what_cannot_be_quantized_or_exported_is_refused_before_the_float_model_trains(
    run, recipe, tmp_path, monkeypatch, quantize, why
):
    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", lambda *a, **k: pytest.fail("trains"))
    path = recipe(pretrain={"epochs": 1}, quantize=quantize)
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert why in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def shifted(tmp_path):
    """A file of a net whose grid of pixels has no code for 0.0."""
    inputs = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(inputs)
    x = keras.layers.Conv2D(4, 1, activation="relu", name="mix")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    keras.Model(inputs, keras.layers.Dense(10)(x)).save(tmp_path / "shifted.keras")
    return tmp_path / "shifted.keras"


@pytest.mark.parametrize(
    ("export", "said"),
    [
        (
            {"target": "coral", "weights": ["int8", "int4_all"]},
            "tiny [export]: model_int4_all.tflite cannot be written for coral; weights = [] trains "
            "and measures the model without: mix (conv_2d): the Edge TPU reads kernels of",
        ),
        ({"target": "builtin", "weights": ["int4", "int8"]}, ": model_int4.tflite cannot be wri"),
        (
            {"weights": ["int8", "int4"], "input_type": "float32"},
            ": model_int8.tflite, model_int4.tflite cannot be written for android; weights = [] "
            "trains and measures the model without: Input image: its grid stands -128 codes",
        ),
    ],
)
def test_files_that_cannot_be_written_are_told_before_the_float_model_trains(
    run, recipe, tmp_path, monkeypatch, shifted, export, said
):
    monkeypatch.setattr("keras_lowbit.cli.trainer.fit", lambda *a, **k: pytest.fail("trains"))
    quantize = {"scheme": "w4a4", "ends_bits": 4}
    model = {"architecture": str(shifted)}
    path = recipe(model=model, pretrain={"epochs": 1}, quantize=quantize, export=export)
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert said in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_file_can_hold_trains_without_files(run, recipe, tmp_path):
    path = recipe(quantize={"exceptions": {"mix": "float"}}, export={"weights": []})
    outcome = run("train", path, "--out", tmp_path / "out", "--epochs=1")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["accuracy"]) == {"float", "quantized"}


def test_distillation_from_a_net_that_nothing_trained_is_refused(run, recipe, tmp_path):
    path = recipe(
        data={"name": "digits", "channels": 3},
        model={"architecture": "resnet8"},
        train={"distill": 0.5, "epochs": 1},
    )
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "distill needs a trained float model" in outcome.error


def test_colour_nets_refuse_grey_images_in_one_line(run, recipe, tmp_path):
    path = recipe(model={"architecture": "resnet20"}, train={"epochs": 1})
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "resnet20 takes images (height, width, 3) in colour" in outcome.error


def test_the_float_model_is_measured_as_it_was_before_its_twin_learned(run, recipe, tmp_path):
    figures = {}
    for name, methods in (("alone", {}), ("mutual", {"mutual": True})):
        path = recipe(train={"distill": 0.5, "epochs": 1, "learning_rate": 0.2}, methods=methods)
        assert run("train", path, "--out", tmp_path / name).code == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        figures[name] = metrics["accuracy"]["float"]["right"]
    assert figures["alone"] == figures["mutual"]


def test_what_callbacks_log_is_in_the_history(run, recipe, tmp_path):
    path = recipe(
        quantize={"scheme": "wta8"},
        train={"epochs": 2, "distill": 0.5},
        methods={"pull": 1.0, "switch_epoch": 1},
    )
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    history = fitting.read_history(tmp_path / "out" / "history.csv")
    assert all(0 < row["ternary_cosine"] <= 1 for row in history)


@pytest.mark.parametrize("flag", ["data", "weights", "out"])
def test_a_flag_that_is_given_empty_is_told_so(run, recipe, flag):
    assert run("train", recipe(), f"--{flag}=").error.startswith(f"--{flag} is empty")


def test_what_a_flag_makes_of_a_recipe_is_refused_with_the_flag(run, recipe, tmp_path):
    path = recipe(train={"epochs": 6, "bit_descent": {"0": 8, "4": 4}})
    said = run("train", path, "--epochs", 2, "--out", tmp_path / "out").error
    assert said == "tiny --epochs 2 [train]: bit_descent: '4' is no epoch of 0..1"


def test_few_bits_learn_from_random_weights(run, recipe, tmp_path):
    train = {"epochs": 3, "batch_size": 64, "learning_rate": 0.03}
    path = recipe(model={"architecture": "resnet8"}, train=train)
    assert run("train", path, "--out", tmp_path / "out").code == 0
    losses = [row["loss"] for row in fitting.read_history(tmp_path / "out" / "history.csv")]
    assert losses[-1] < 1.8  # 2.30 is chance, and stayed
