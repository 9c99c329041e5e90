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

from keras_lowbit.callbacks import BitDescent, FreezeOscillating, Resume
from keras_lowbit.quantizers.sites import sites_of
from tests.callbacks import resume_job, tiny

ROOT = Path(__file__).resolve().parents[2]


def killed(**arguments):
    """Run the job in a process of its own, which dies."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.resume_job", json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


# Step 4 is the first at 6 bits; step 11 the second at 4 bits. Epochs have 3 steps.
@pytest.mark.parametrize(("kind", "kill_at", "begun"), [("keras", 4, 1), ("resume", 11, 3)])
def test_a_killed_descent_resumes_bit_for_bit(kind, kill_at, begun, tmp_path):
    whole, expected = resume_job.run(kind, None)
    directory = str(tmp_path / "backup")
    killed(kind=kind, directory=directory, kill_at=kill_at)
    assert os.listdir(directory)
    rest, found = resume_job.run(kind, directory)
    assert rest == {epoch: whole[epoch] for epoch in range(begun, resume_job.EPOCHS)}
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not os.path.isdir(directory) or not os.listdir(directory)


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


class Scales(keras.callbacks.Callback):
    """Bits and scales at the beginning of each epoch, after the descent had its turn."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.of[epoch] = tiny.bits(self.model), scales(self.model)


def scales(model):
    return [np.array(ops.convert_to_numpy(s.quantizer.scale)) for s in sites_of(model)]


def test_a_backup_within_an_epoch_hands_scales_over_once(tmp_path):
    model = tiny.model()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path), save_freq=5)  # step 5: epoch 1
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, [BitDescent({0: 8, 1: 6, 2: 4}), backup, Interrupt(1, 1)], epochs=3)
    saved = scales(model)
    keras.utils.clear_session(free_memory=False)
    model, seen = tiny.model(), Scales()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path), save_freq=5)
    tiny.train(model, [backup, BitDescent({0: 8, 1: 6, 2: 4}), seen], epochs=3)
    assert min(seen.of) == 1  # Keras repeats the epoch from its first batch
    bits, found = seen.of[1]
    assert bits["middle.kernel_quantizer"] == 6
    for a, b in zip(found, saved, strict=True):
        np.testing.assert_array_equal(a, b)


def dense():
    model = keras.Sequential([keras.Input(tiny.SHAPE), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3))
    tiny.compile_(model)
    return model


def test_an_unfinished_snapshot_is_passed_over(tmp_path):
    tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=2)
    assert os.listdir(tmp_path) == ["epoch_000002"]
    (tmp_path / "epoch_000003.unfinished").mkdir()
    (tmp_path / "epoch_000003.unfinished" / "latest.weights.h5").write_bytes(b"half")
    history = tiny.train(dense(), [Resume(tmp_path)], epochs=4)
    assert history.epoch == [2, 3]


def test_snapshots_come_every_n_epochs_and_go_when_training_ends_well(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.train(dense(), [Resume(tmp_path, every=2), Interrupt(3, 2)], epochs=9)
    assert os.listdir(tmp_path) == ["epoch_000002"]
    assert tiny.train(dense(), [Resume(tmp_path, every=2)], epochs=4).epoch == [2, 3]
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_error_and_leaves_the_snapshot_before(tmp_path, small_disk, contents):
    tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=1)
    before = contents(tmp_path)
    for room in (0, 100, 4000):  # the file of weights has more, that of random states fewer
        with small_disk(room), pytest.raises(OSError, match="File too large; no snapshot") as found:
            tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=3)
        assert found.value.filename == str(tmp_path / "epoch_000002")
        assert contents(tmp_path) == before
        assert len(os.listdir(tmp_path)) == 1
    assert tiny.train(dense(), [Resume(tmp_path)], epochs=3).epoch == [1, 2]


@pytest.mark.parametrize("begun", [1, 2], ids=["cut short", "all done"])
def test_the_next_fit_of_a_resumed_model_begins_at_its_own_epoch(begun, tmp_path):
    tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=begun)
    model = dense()
    assert tiny.train(model, [Resume(tmp_path)], epochs=2).epoch == [*range(begun, 2)]
    assert tiny.train(model, [], epochs=3).epoch == [0, 1, 2]


def test_an_interrupted_resume_leaves_no_epoch_to_begin_at(tmp_path):
    tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=2)
    model = dense()
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, [Resume(tmp_path), Interrupt(2, 1)], epochs=4)
    assert tiny.train(model, [], epochs=4, initial_epoch=1).epoch == [1, 2, 3]


def with_dropouts(count):
    model = keras.Sequential([keras.Input(tiny.SHAPE), keras.layers.Flatten()])
    for _ in range(count):
        model.add(keras.layers.Dropout(0.1))
    model.add(keras.layers.Dense(3))
    tiny.compile_(model)
    return model


@pytest.mark.parametrize("content", [None, b"", b"PK", b"no archive"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("seeds.npz", r"seeds\.npz is damaged"),
        ("state_0.npz", r"state_0\.npz is damaged"),
        ("latest.weights.h5", " is damaged or belongs to another model than tiny"),
    ],
    ids=["seeds", "state", "weights"],
)
def test_a_damaged_snapshot_is_named_and_changes_nothing(name, place, content, tmp_path):
    also = FreezeOscillating()
    tiny.train(tiny.model(), [also, Resume(tmp_path, keep=True, also=[also])], epochs=1)
    file = tmp_path / "epoch_000001" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    model, also = tiny.model(), FreezeOscillating()
    before = model.get_weights()
    said = rf"epoch_000001.*{place}.* \(.+\)\. Start afresh with an empty directory"
    with pytest.raises(ValueError, match=said) as found:
        tiny.train(model, [also, Resume(tmp_path, also=[also])], epochs=2)
    assert "pickle" not in str(found.value)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [0, 2])
def test_a_snapshot_of_a_model_with_other_dropouts_is_named(count, tmp_path):
    tiny.train(with_dropouts(1), [Resume(tmp_path, keep=True)], epochs=1)
    said = (
        rf"epoch_000001 belongs to another model than sequential.*: it has 1 random states, not "
        rf"{count}\. Give each training a directory of its own"
    )
    with pytest.raises(ValueError, match=said):
        tiny.train(with_dropouts(count), [Resume(tmp_path)], epochs=2)


def test_a_snapshot_of_a_model_of_other_shapes_is_named(tmp_path):
    tiny.train(dense(), [Resume(tmp_path, keep=True)], epochs=1)
    other = keras.Sequential([keras.Input(tiny.SHAPE), keras.layers.Flatten()], name="wide")
    other.add(keras.layers.Dense(4))
    tiny.compile_(other)
    said = r"epoch_000001 is damaged or belongs to another model than wide \(.+\)\. Start afresh"
    with pytest.raises(ValueError, match=said):
        tiny.train(other, [Resume(tmp_path)], epochs=2)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every must be a whole number of at least 1\. Got 0"):
        Resume(tmp_path, every=0)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file; give a directory"):
        Resume(file)
