"""Cycles of descents: CTMQ, arXiv:2206.12794, the acceptance checks of methods 1.4."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import BitDescent, DampenOscillations, TwoStage
from keras_lowbit.data import AugmentedBatches
from keras_lowbit.distillation import MutualDistiller
from keras_lowbit.optimizers import RatedAdam
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.training import (
    CyclicTraining,
    Stage,
    StagePlan,
    files,
    quantizer_rates,
    stages,
)
from tests.callbacks import tiny
from tests.training import cyclic_job

ROOT = Path(__file__).resolve().parents[2]
FLOAT = Stage("float", None, None, 1, 1e-3)


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train(model, training, **options):
    x, y = tiny.images()
    given = {"loss": loss(), "jit_compile": keras.backend.backend() == "jax"}
    # Each stage is compiled anew; where that is not the claim, TensorFlow need not trace.
    given["run_eagerly"] = keras.backend.backend() == "tensorflow"
    given.update(options.pop("compile_options", {}))
    made = {"optimizer": lambda visit: keras.optimizers.Adam(visit.stage.learning_rate)}
    return training.fit(
        model, x, y, compile_options=given, batch_size=8, shuffle=False, **{**made, **options}
    )


class Watch(keras.callbacks.Callback):
    """State of the middle layer's kernel at the beginning and end of each stage."""

    def __init__(self, visit, log):
        super().__init__()
        self.visit, self.log = visit, log

    def state(self):
        layer = self.model.get_layer("middle")
        quantizer = layer.kernel_quantizer
        codes, _ = quantizer.encode(layer.kernel)
        return {
            "stage": self.visit.stage.name,
            "bits": quantizer.bits if quantizer.enabled else 32,
            "kernel": np.array(ops.convert_to_numpy(layer.kernel)),
            "values": np.array(ops.convert_to_numpy(codes)),
            "reach": np.array(ops.convert_to_numpy(quantizer.scale)) * quantizer.static_bounds()[1],
            "optimizer": self.model.optimizer,
            "iterations": int(ops.convert_to_numpy(self.model.optimizer.iterations)),
            "mean": np.array(ops.convert_to_numpy(self.model.get_layer("bn1").moving_mean)),
        }

    def on_train_begin(self, logs=None):
        self.log.append(("entry", self.state()))

    def on_train_end(self, logs=None):
        self.log.append(("exit", self.state()))


def test_acceptance_checks_of_a_descent_in_two_cycles():
    model, log = tiny.model("w1a2", compiled=False), []
    plan = StagePlan(tuple(Stage(f"w{b}", b, max(b, 2), 1, 1e-3) for b in (4, 3, 2, 1)))
    training = CyclicTraining(plan, 2, FLOAT, reestimate_batches=1)
    result = train(model, training, callbacks=lambda visit: [Watch(visit, log)])
    entries = [state for where, state in log if where == "entry"]
    exits = [state for where, state in log if where == "exit"]
    # (a) the bits visited are exactly the plan.
    assert [s["bits"] for s in entries] == [4, 3, 2, 1, 32, 4, 3, 2, 1]
    assert [row["name"] for row in result.rows] == [s["stage"] for s in entries]
    for before, after in zip(exits, entries[1:], strict=False):
        # (b) weights at entry are those at exit, bit for bit.
        np.testing.assert_array_equal(before["kernel"], after["kernel"])
        # (d) the hand-over keeps the range: one float32 rounding a change.
        np.testing.assert_allclose(after["reach"], before["reach"], rtol=2.0**-22)
        assert after["optimizer"] is not before["optimizer"]
    assert all(s["iterations"] == 0 for s in entries)
    assert all(s["iterations"] == 3 for s in exits)
    for state in entries + exits:
        # (c) at most 2^bits values.
        if state["bits"] < 32:
            assert len(np.unique(state["values"])) <= 2 ** state["bits"]
        else:
            np.testing.assert_array_equal(state["values"], state["kernel"])
    # C sum(E_k) + (C - 1) E_return = 2 * 4 + 1.
    assert result.total_epochs == training.total_epochs == 9
    assert [row["first_epoch"] for row in result.rows] == list(range(9))


def test_batch_norms_are_fresh_at_the_entry_of_a_stage():
    model, log = tiny.model("w2a2", compiled=False), []
    plan = StagePlan((Stage("only", 2, 2, 1, 1e-3),))
    model.get_layer("bn1").moving_mean.assign([9.0, 9.0, 9.0])
    train(model, CyclicTraining(plan, 1), callbacks=lambda visit: [Watch(visit, log)])
    assert np.abs(log[0][1]["mean"]).max() < 5


def test_batches_of_a_generator_serve_the_batch_norms_of_every_stage():
    x, _ = tiny.images()
    plan = StagePlan(tuple(Stage(f"w{b}", b, 4, 1, 1e-3) for b in (4, 3, 2)))
    batches = (x[i : i + 8] for i in (0, 8, 16))
    model = tiny.model("w2a4", compiled=False)
    result = train(model, CyclicTraining(plan, 1), batch_norm_data=batches)
    assert len(result.rows) == 3


class Strengths(keras.callbacks.Callback):
    """What a `DampenOscillations` pulls with in each epoch, and how many epochs it is told of."""

    def __init__(self, dampen, log):
        super().__init__()
        self.dampen, self.log = dampen, log

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.dampen.params["epochs"]
        self.log.append((epochs, self.dampen.strength_at(epoch, epochs)))


def test_schedules_run_once_over_all_stages():
    """Two stages of two epochs: a half cosine over the four, and a switch in the second stage."""
    model, log = tiny.model("w3a4", compiled=False), []
    plan = StagePlan(tuple(Stage(f"w{b}", b, 4, 2, 1e-3) for b in (4, 3)))
    dampen, switch = DampenOscillations(0.1), TwoStage(3)
    train(
        model,
        CyclicTraining(plan, 1),
        # A bar of Keras keeps no parameters.
        callbacks=lambda visit: [
            *(switch, dampen, Strengths(dampen, log)),
            keras.callbacks.ProgbarLogger(),
        ],
    )
    assert [epochs for epochs, _ in log] == [4] * 4
    # 0.05 (1 - cos(pi e / 3))
    np.testing.assert_allclose([s for _, s in log], [0.0, 0.025, 0.075, 0.1], atol=1e-12)


def test_rates_of_quantizers_are_those_of_what_a_stage_trains():
    """The rates are asked for when frozen quantizers are frozen."""
    model = tiny.model("w3a4", compiled=False)
    plan = StagePlan(
        (
            Stage("all", 4, 4, 1, 1e-3),
            Stage("some", 3, 4, 1, 1e-3, frozen=("middle.kernel_quantizer",)),
        )
    )
    result = train(
        model,
        CyclicTraining(plan, 1),
        optimizer=lambda visit: RatedAdam(1e-3, rates=quantizer_rates(model, 0.1)),
    )
    assert len(result.rows) == 2


def killed(**arguments):
    """Run the job in a process of its own, which dies."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.cyclic_job", json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_training_goes_on_at_its_stage_and_epoch_bit_for_bit(tmp_path):
    """Step 8 is in the second epoch of stage 1; three more stages follow the resumed one."""
    _, seen, expected = cyclic_job.run(None)
    assert [epoch for _, epoch in seen] == list(range(cyclic_job.EPOCHS))
    directory = str(tmp_path / "run")
    killed(directory=directory, kill_at=8)
    log = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [row["name"] for row in log["stages"]] == ["kernels"]
    result, rest, found = cyclic_job.run(directory)
    assert rest == [(1, 2), (2, 3), (3, 4), (4, 5), (4, 6)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["logs"].keys() for row in result.rows] == [{"loss"}] * 5
    epochs = json.loads((tmp_path / "run" / "epochs.json").read_text())
    assert [(row["epoch"], row["stage"]) for row in epochs] == [
        (epoch, stage) for stage, epoch in seen
    ]
    # A finished training has nothing left to do, and gives the same weights.
    _, again, same = cyclic_job.run(directory)
    assert again == []
    for a, b in zip(same, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class Counting(keras.callbacks.Callback):
    """Counts batches over epochs, as `FreezeOscillating` does; amid a stage it may be killed."""

    def __init__(self, seen, kill_at=None):
        super().__init__()
        self.count, self.seen, self.kill_at = 0, seen, kill_at

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append((epoch, self.count))
        if epoch == self.kill_at:
            raise KeyboardInterrupt

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1

    def get_state(self):
        return {"count": np.array(self.count)}

    def set_state(self, state):
        self.count = int(state["count"])


def test_what_callbacks_have_counted_goes_on_after_a_kill(tmp_path):
    training = CyclicTraining(StagePlan((Stage("only", 2, 2, 4, 1e-3),)), 1, reestimate_batches=0)
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny.model("w2a2"),
            training,
            callbacks=lambda visit: [Counting([], kill_at=2)],
            directory=tmp_path,
        )
    seen = []
    callbacks = lambda visit: [Counting(seen)]  # noqa: E731
    train(tiny.model("w2a2"), training, callbacks=callbacks, directory=tmp_path)
    assert seen == [(2, 6), (3, 9)]  # epochs of 3 steps


def test_a_model_that_keras_restored_before_begins_at_the_first_epoch(tmp_path):
    model, log = tiny.model("w2a2"), []
    for _ in range(2):  # the second one restores epoch 1, and nothing is left to do
        backup = keras.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)
        tiny.train(model, [backup], epochs=1)
    plan = StagePlan((Stage("only", 2, 2, 2, 1e-3),))
    train(model, CyclicTraining(plan, 1), callbacks=lambda visit: [Watch(visit, log)])
    assert log[-1][1]["iterations"] == 2 * 3  # epochs of 3 steps


class Figure(keras.callbacks.Callback):
    """Logs a figure of its own, to be monitored."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_epoch_end(self, epoch, logs=None):
        logs["figure"] = float(self.value)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_the_model_ends_with_the_best_cycle(mode, best):
    model, log = tiny.model("w2a2", compiled=False), []
    training = CyclicTraining(
        StagePlan((Stage("w2a2", 2, 2, 1, 1e-3),)),
        2,
        FLOAT,
        monitor="figure",
        mode=mode,
    )
    result = train(model, training, callbacks=lambda v: [Figure(v.cycle), Watch(v, log)])
    assert result.best_cycle == best
    ends = [s for where, s in log if (where, s["stage"]) == ("exit", "w2a2")]
    kernels = [state["kernel"] for state in ends]
    np.testing.assert_array_equal(
        np.array(ops.convert_to_numpy(model.get_layer("middle").kernel)), kernels[best - 1]
    )
    assert not np.array_equal(kernels[0], kernels[1])


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_cycle_whose_figure_is_nan_is_not_the_best(mode, broken):
    """`max` keeps a NaN that comes first: nothing is greater."""
    plan = StagePlan((Stage("w2a2", 2, 2, 1, 1e-3),))
    training = CyclicTraining(plan, 2, FLOAT, monitor="figure", mode=mode, reestimate_batches=0)
    figure = {broken: np.nan, 3 - broken: 1.0}
    model = tiny.model("w2a2", compiled=False)
    result = train(model, training, callbacks=lambda visit: [Figure(figure[visit.cycle])])
    assert result.best_cycle == 3 - broken


def test_what_a_stage_freezes_stays_and_trains_again_afterwards():
    model = tiny.model("w2a2", compiled=False)
    names = ("middle", "bn2")
    before = {name: _weights(model.get_layer(name)) for name in names}
    scale = model.get_layer("middle").kernel_quantizer.scale
    frozen = Stage("a", 2, 2, 1, 1e-2, frozen=("bn2", "*.kernel_quantizer"))
    beta = model.get_layer("bn2").beta
    beta.trainable = False  # the user's own choice, which must survive
    train(model, CyclicTraining(StagePlan((frozen,)), 1, reestimate_batches=0))
    for a, b in zip(before["bn2"], _weights(model.get_layer("bn2")), strict=True):
        np.testing.assert_array_equal(a, b)
    after = _weights(model.get_layer("middle"))
    assert not np.array_equal(before["middle"][0], after[0])  # the kernel trained
    np.testing.assert_array_equal(before["middle"][1], after[1])  # its scale did not
    assert scale.trainable
    assert model.get_layer("bn2").trainable
    assert not beta.trainable


def _weights(layer):
    return [np.array(ops.convert_to_numpy(w)) for w in layer.weights]


def test_it_composes_with_distillation_and_a_descent():
    teacher = tiny.float_model()
    student, seen = tiny.model("w2a2", compiled=False), []
    distiller = MutualDistiller(teacher, [student])
    plan = StagePlan((Stage("w2a2", 2, 2, 2, 1e-3, frozen=("bn1",)),))

    class Bits(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                layer, grid = student.get_layer("middle"), student.get_layer("relu1_quantize")
                pair = (layer.kernel_quantizer, grid.quantizer)
                seen.append(tuple(q.bits if q.enabled else 32 for q in pair))

    def callbacks(visit):
        if visit.stage == FLOAT:
            return [Bits()]
        start = visit.first_epoch
        return [BitDescent({start: 3, start + 1: 2}, targets="activations"), Bits()]

    result = train(
        distiller,
        CyclicTraining(plan, 2, FLOAT, reestimate_batches=1, monitor="loss_0", mode="min"),
        callbacks=callbacks,
        compile_options={"metrics": ["accuracy"], "run_eagerly": False},
    )
    assert seen == [(2, 3), (2, 2), (32, 32), (2, 3), (2, 2)]
    assert set(result.rows[0]["logs"]) == {"loss", "loss_float", "loss_0", "accuracy"}
    assert {s.quantizer.enabled for s in sites_of(student)} == {True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": [4, 2]}, "plan must be a StagePlan"),
        ({"cycles": 0}, "cycles must be a whole number of at least 1"),
        ({"cycles": 2}, "give one for 2 or more cycles"),
        ({"cycles": 1, "return_stage": FLOAT}, "None for 1"),
        ({"cycles": 2, "return_stage": Stage("r", 3, 8, 1, 0.1)}, "rise inside a cycle"),
        ({"cycles": 2, "return_stage": Stage("w4a4", 8, 8, 1, 0.1)}, "a name of its own"),
        ({"cycles": 1, "mode": "best"}, "mode must be 'max' or 'min'"),
    ],
)
def test_bad_trainings_are_refused_at_construction(arguments, message):
    plan = StagePlan.descent((4, 2), epochs=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=message):
        CyclicTraining(**{"plan": plan, **arguments})


class TestBadInputOfFit:
    plan = StagePlan.descent((4, 2), epochs=1, learning_rate=1e-3)

    @pytest.mark.parametrize(
        ("scheme", "stage", "message"),
        [
            ("w3a3", Stage("low", 2, 3, 1, 0.1), "low asks for 2 bits of kernels, .* at 3 or more"),
            ("w2a4", Stage("low", 2, 2, 1, 0.1), "2 bits of activations"),
            (
                "w2a2",
                Stage("odd", 2, 2, 1, 0.1, frozen=("conv*",)),
                "odd freezes 'conv\\*', which matches no layer",
            ),
        ],
    )
    def test_stages_that_do_not_fit_the_model_are_refused(self, scheme, stage, message):
        with pytest.raises(ValueError, match=message):
            stages.prepare(tiny.model(scheme, compiled=False), [stage])

    def test_a_float_model_is_refused(self):
        with pytest.raises(ValueError, match="tiny has no quantizer"):
            stages.prepare(tiny.float_model(), self.plan.stages)

    def test_options_that_stages_decide_are_refused(self):
        with pytest.raises(ValueError, match="stages decide epochs"):
            train(tiny.model("w2a2"), CyclicTraining(self.plan, 1), epochs=3)

    def test_a_monitor_without_validation_is_refused(self):
        training = CyclicTraining(self.plan, 1, monitor="val_loss")
        with pytest.raises(ValueError, match="val_loss needs validation_data"):
            train(tiny.model("w2a2"), training)

    def test_the_same_optimizer_twice_is_refused(self):
        one = keras.optimizers.SGD(0.1)
        with pytest.raises(ValueError, match="a new one for each stage"):
            train(
                tiny.model("w2a2"),
                CyclicTraining(self.plan, 1, reestimate_batches=0),
                optimizer=lambda visit: one,
            )

    def test_a_directory_of_another_plan_is_refused(self, tmp_path):
        content = {"plan": [], "stages": []}
        (tmp_path / "stages.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="holds a training of another plan"):
            train(tiny.model("w2a2"), CyclicTraining(self.plan, 1), directory=tmp_path)

    def test_a_directory_that_is_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file; give a directory"):
            train(tiny.model("w2a2"), CyclicTraining(self.plan, 1), directory=tmp_path / "file")


def test_variables_that_callbacks_add_are_no_part_of_what_is_kept(tmp_path):
    """Only the second descent dampens, so the weights kept before had no variable for it."""
    plan = StagePlan.descent((4, 2), epochs=1, learning_rate=1e-3)
    training = CyclicTraining(
        plan, 2, FLOAT, reestimate_batches=0, monitor="accuracy_is", mode="max"
    )

    class Better(keras.callbacks.Callback):
        """A figure by which the first cycle is the best."""

        def __init__(self, visit):
            super().__init__()
            self.value = -float(visit.cycle)

        def on_epoch_end(self, epoch, logs=None):
            logs["accuracy_is"] = self.value

    def callbacks(visit):
        return [Better(visit), *([DampenOscillations()] if visit.cycle == 2 else [])]

    model = tiny.model("w2a2", compiled=False)
    result = train(model, training, callbacks=callbacks, directory=tmp_path / "run")
    assert result.best_cycle == 1
    kept = [np.asarray(ops.convert_to_numpy(v)) for v in model.trainable_variables]
    other = tiny.model("w2a2", compiled=False)
    files.read_state(other, tmp_path / "run" / "exit_001.npz")
    for a, b in zip(kept, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(b))


def test_metrics_by_class_are_logged_as_lists(tmp_path):
    log = files.EpochLog(tmp_path / "epochs.json", 2)
    log.on_epoch_end(0, {"loss": np.float32(0.5), "f1": np.float32([0.25, 1.0])})
    (row,) = files.read_json(tmp_path / "epochs.json", [])
    assert row == {"epoch": 0, "stage": 2, "loss": 0.5, "f1": [0.25, 1.0]}


class Stop(keras.callbacks.Callback):
    """Ends a training at the beginning of an epoch, as a kill would."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_stage_begun_anew_takes_the_statistics_of_augmented_images_that_it_took(tmp_path):
    """The batches of a process that has just begun stood at epoch 0."""
    x, y = tiny.images()

    def run(folder, *stops):
        keras.utils.set_random_seed(0)
        model = tiny.model("w2a2", compiled=False)
        batches = AugmentedBatches(x, y, 8, pad=2)
        CyclicTraining(StagePlan.descent((3, 2), epochs=1, learning_rate=1e-3), 1).fit(
            model,
            batches,
            optimizer=lambda visit: keras.optimizers.SGD(visit.stage.learning_rate),
            compile_options={"loss": loss()},
            callbacks=lambda visit: [batches.follow_epochs(), *stops],
            directory=folder,
        )
        return model.get_weights()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Stop(1))
    for a, b in zip(whole, run(tmp_path / "cut"), strict=True):
        np.testing.assert_array_equal(a, b)
