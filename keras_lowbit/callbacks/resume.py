"""Backups from which killed training goes on as if nothing had happened."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_count
from keras_lowbit.whole_files import AFRESH, DAMAGE, first_line, read_arrays

_SEEDS = "seeds.npz"
_STATE = "state_{}.npz"
_SNAPSHOT = re.compile(r"epoch_(\d{6})")


class Resume(keras.callbacks.Callback):
    """`keras.callbacks.BackupAndRestore`, whole at any moment, and with random states.

    Start the same script again after a kill: `fit` goes on with the epoch that was cut short, and
    losses, bits, scales and weights are those of a run that was never killed. For that the data
    must depend on the epoch only: `shuffle=False`, or a data set that seeds its epochs
    (`keras_lowbit.data.AugmentedBatches` with `follow_epochs()`).

    What it adds to the callback of Keras, which does the saving and loading:

    * A snapshot is written under another name and renamed when complete. In place, a kill between
      the two files of Keras leaves new weights beside the old epoch's number, and an epoch is
      trained twice.
    * The epoch to go on with is that of one `fit`; Keras leaves it in the model, where it overrules
      the `initial_epoch` of every later one.
    * States of `keras.random.SeedGenerator` (dropout), which weights files leave out. PyTorch's own
      generator, which dropout uses there, is not among them.

    Snapshots are taken at the ends of epochs only: `fit` cannot start amid the data.

    List it last, so that what other callbacks do at the end of an epoch is in the snapshot.

    Args:
        directory: where snapshots lie; one for each run. Empty or absent starts afresh.
        every: epochs between two snapshots.
        keep: leave the last snapshot when training ends well; by default the directory's
            snapshots are removed then.
        also: callbacks of the same `fit` that count, `FreezeOscillating`: they have `get_state()`,
            a dict of arrays, and `set_state(arrays)`. Those that follow from the epoch need none.

    Raises:
        ValueError: `every` below 1, `directory` is a file, or something in `also` has no state;
            when training starts, a snapshot that is damaged, of another model, or taken without
            one of `also`.
        OSError: the disk is full or refuses; names the snapshot. An older one is untouched.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        every: int = 1,
        keep: bool = False,
        *,
        also: Sequence[keras.callbacks.Callback] = (),
    ):
        super().__init__()
        for callback in also:
            if not hasattr(callback, "get_state"):
                raise ValueError(
                    f"Resume: {type(callback).__name__} has no get_state(): leave it out of also"
                )
        self.also = tuple(also)
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"Resume: {directory} is a file; give a directory")
        self.every = checked_count(every, who="Resume: every", least=1)
        self.keep = keep

    def on_train_begin(self, logs=None):
        """Restore the last complete snapshot, if there is one."""
        found = self._snapshots()
        if not found:
            return
        # Read before anything is changed.
        seeds, states = self._arrays_of(found[-1])
        try:
            self._keras_backup(found[-1]).on_train_begin()
        except DAMAGE as error:
            raise ValueError(
                f"Resume: {found[-1]} is damaged or belongs to another model than "
                f"{self.model.name} ({first_line(error)}). {AFRESH}"
            ) from error
        for state, array in zip(self._seed_states(), seeds, strict=True):
            state.assign(array)
        for callback, arrays in zip(self.also, states, strict=True):
            callback.set_state(arrays)

    def on_epoch_begin(self, epoch, logs=None):
        """Keras has read where to begin; forgotten now, it is also when `fit` is interrupted."""
        forget_initial_epoch(self._model)

    def on_epoch_end(self, epoch, logs=None):
        """Take a snapshot."""
        if (epoch + 1) % self.every == 0:
            self._save(epoch)

    def on_train_end(self, logs=None):
        """Remove the snapshots of a run that came to its end."""
        forget_initial_epoch(self._model)  # no epoch began where all were done before
        if not self.keep:
            for snapshot in self._snapshots():
                shutil.rmtree(snapshot)

    def _save(self, epoch):
        final = self.directory / f"epoch_{epoch + 1:06d}"
        unfinished = final.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            self._fill(unfinished, epoch)
            os.replace(unfinished, final)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            number = error.errno or errno.EIO
            reason = f"{os.strerror(number)}; no snapshot was taken and an older one is untouched"
            raise OSError(number, reason, str(final)) from error
        for older in self._snapshots()[:-1]:
            shutil.rmtree(older)

    def _fill(self, folder, epoch):
        backup = self._keras_backup(folder)
        backup.set_model(_SavedInMemory(self.model))
        backup.on_epoch_end(epoch)
        states = [ops.convert_to_numpy(state) for state in self._seed_states()]
        np.savez(folder / _SEEDS, **{f"{i:06d}": state for i, state in enumerate(states)})
        for i, callback in enumerate(self.also):
            np.savez(folder / _STATE.format(i), **callback.get_state())

    def _arrays_of(self, snapshot):
        """Random states, and the arrays of each of `also`."""
        seeds, wanted = [*read_arrays(snapshot / _SEEDS).values()], len(self._seed_states())
        if len(seeds) != wanted:
            raise ValueError(
                f"Resume: {snapshot} belongs to another model than {self.model.name}: it has "
                f"{len(seeds)} random states, not {wanted}. Give each training a directory of its "
                "own"
            )
        files = [snapshot / _STATE.format(i) for i in range(len(self.also))]
        for callback, file in zip(self.also, files, strict=True):
            if not file.exists():
                raise ValueError(
                    f"Resume: {snapshot} holds no state of {type(callback).__name__}: it was "
                    f"taken without it in also. {AFRESH}"
                )
        return seeds, [read_arrays(file) for file in files]

    def _snapshots(self):
        """Complete snapshots, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if _SNAPSHOT.fullmatch(p.name))

    def _keras_backup(self, folder):
        backup = keras.callbacks.BackupAndRestore(str(folder), delete_checkpoint=False)
        backup.set_model(self._model)
        return backup

    def _seed_states(self):
        model = self.model
        weights = {id(v) for v in model.weights}
        return [v for v in model.variables if id(v) not in weights]


class _SavedInMemory:
    """Stands for a model whose weights are saved: HDF5 in memory, then its bytes at once.

    Where HDF5 itself meets a full disk its files cannot be closed any more, and the process ends in
    a segmentation fault.
    """

    def __init__(self, model):
        self._model = model

    def save_weights(self, filepath, overwrite=True):
        content = _NamedBytes(filepath)
        self._model.save_weights(content, overwrite=overwrite)
        Path(filepath).write_bytes(content.getvalue())


class _NamedBytes(io.BytesIO):
    """Bytes that Keras takes for a file, by the ending of its name."""

    def __init__(self, name):
        super().__init__()
        self._name = str(name)

    def __str__(self):
        return self._name


def forget_initial_epoch(model: keras.Model) -> None:
    """Let the next `fit` begin where its own `initial_epoch` says.

    `keras.callbacks.BackupAndRestore` writes the epoch to go on with into the model, `fit` prefers
    it to its argument, and nothing takes it out again.
    """
    model._initial_epoch = None
