"""Backups from which killed training goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit.callbacks.sites import checked_count

_SEEDS = "seeds.npz"
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
    * States of `keras.random.SeedGenerator` (dropout), which weights files leave out. PyTorch's own
      generator, which dropout uses there, is not among them.

    Snapshots are taken at the ends of epochs only: `fit` cannot start amid the data.

    List it last, so that what other callbacks do at the end of an epoch is in the snapshot.

    Args:
        directory: where snapshots lie; one for each run. Empty or absent starts afresh.
        every: epochs between two snapshots.
        keep: leave the last snapshot when training ends well; by default the directory's
            snapshots are removed then.

    Raises:
        ValueError: `every` below 1, or `directory` is a file.
    """

    def __init__(self, directory: str | os.PathLike, every: int = 1, keep: bool = False):
        super().__init__()
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
        self._keras_backup(found[-1]).on_train_begin()
        with np.load(found[-1] / _SEEDS) as seeds:
            for state, name in zip(self._seed_states(), sorted(seeds.files), strict=True):
                state.assign(seeds[name])

    def on_epoch_end(self, epoch, logs=None):
        """Take a snapshot."""
        if (epoch + 1) % self.every == 0:
            self._save(epoch)

    def on_train_end(self, logs=None):
        """Remove the snapshots of a run that came to its end."""
        if not self.keep:
            for snapshot in self._snapshots():
                shutil.rmtree(snapshot)

    def _save(self, epoch):
        final = self.directory / f"epoch_{epoch + 1:06d}"
        unfinished = final.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._keras_backup(unfinished).on_epoch_end(epoch)
        states = [ops.convert_to_numpy(state) for state in self._seed_states()]
        np.savez(unfinished / _SEEDS, **{f"{i:06d}": state for i, state in enumerate(states)})
        os.replace(unfinished, final)
        for older in self._snapshots()[:-1]:
            shutil.rmtree(older)

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
