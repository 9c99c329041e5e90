"""Descents in bits, one after the other, each starting from what the last one learned."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import keras

from keras_lowbit.callbacks import Resume, norms
from keras_lowbit.callbacks.resume import forget_initial_epoch
from keras_lowbit.checks import checked_count
from keras_lowbit.training import files, stages
from keras_lowbit.training.plan import Stage, StagePlan, Visit, visits

_FORBIDDEN = ("epochs", "initial_epoch", "steps_per_execution")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training in stages did.

    Args:
        rows: one mapping for each stage: cycle, bits, epochs, learning rate and its last logs.
        total_epochs: of all stages.
        best_cycle: the cycle whose weights the model ends with, from 1.
    """

    rows: tuple[dict, ...]
    total_epochs: int
    best_cycle: int


class CyclicTraining:
    """Trains one model through a plan of stages, `cycles` times.

        for c in 1..cycles:
            if c > 1: train return_stage            # low-bit weights start the accurate model
            for stage in plan: train stage          # whose weights start the next descent

    At the entry of a stage bits are set (`stages.set_bits`: the representable range is kept; float
    stages switch quantizers off), kernels stay as they are bit for bit, batch-norm statistics are
    re-estimated, and the optimizer is new. One graph serves all bits. Compare with other methods at
    equal `total_epochs`, which is `C sum(E_k) + (C - 1) E_return`.

        plan = StagePlan.descent((4, 3, 2), epochs=2, learning_rate=1e-2)
        accurate = Stage("float", None, None, epochs=1, learning_rate=1e-3)
        training = CyclicTraining(plan, cycles=2, return_stage=accurate)
        training.fit(
            model, x, y,
            optimizer=lambda visit: keras.optimizers.SGD(visit.stage.learning_rate, momentum=0.9),
            compile_options={"loss": ...},
        )

    Adam moves a scale by the learning rate a step, and 8-bit scales are often smaller than 1e-3:
    give them a rate of their own (`RatedAdam` with `quantizer_rates`).

    Args:
        plan: stages of a cycle.
        cycles: how many.
        return_stage: the accurate model, trained between cycles: float, or at least the first
            stage's bits. Needed, and only allowed, with 2 or more cycles.
        reestimate_batches: batches for the statistics of batch norms; 0 leaves them.
        monitor: name in the logs; the model ends with the weights of the cycle whose last epoch had
            the best value. `None`: with those of the last cycle. Use a split that is not the test
            set.
        mode: `"max"` or `"min"` of `monitor`.

    Raises:
        ValueError: no plan, no cycles, a return stage missing, too many or below the plan's first
            bits, an unknown mode.

    Reference:
        Kim, Shin, Del Barrio, CTMQ: Cyclic Training of Convolutional Neural Networks with Multiple
        Quantization Steps, 2022, arXiv:2206.12794, of which only the abstract could be read: the
        descent by one bit and the return to the accurate model are its own, the rest of the loop
        is a reconstruction.
    """

    def __init__(
        self,
        plan: StagePlan,
        cycles: int = 2,
        return_stage: Stage | None = None,
        *,
        reestimate_batches: int = 50,
        monitor: str | None = None,
        mode: str = "max",
    ):
        if not isinstance(plan, StagePlan):
            raise ValueError(f"CyclicTraining: plan must be a StagePlan. Got {plan!r}")
        self.plan = plan
        self.cycles = checked_count(cycles, who="CyclicTraining: cycles", least=1)
        if (cycles > 1) != isinstance(return_stage, Stage):
            raise ValueError(
                "CyclicTraining: return_stage is the Stage between cycles: give one for 2 or more "
                f"cycles, None for 1. Got cycles={cycles}, return_stage={return_stage!r}"
            )
        if return_stage is not None:
            first = plan.stages[0]
            if any(b < a for a, b in zip(first.bits, return_stage.bits, strict=True)):
                raise ValueError(
                    f"CyclicTraining: return_stage {return_stage.name} has bits "
                    f"{return_stage.bits}, fewer than {first.bits} of the plan's first stage, so "
                    "bits would rise inside a cycle. Return to as many bits or to float"
                )
            if return_stage.name in [stage.name for stage in plan.stages]:
                raise ValueError(
                    f"CyclicTraining: return_stage needs a name of its own. Got {return_stage.name}"
                )
        self.return_stage = return_stage
        who = "CyclicTraining: reestimate_batches"
        self.reestimate_batches = checked_count(reestimate_batches, who=who, least=0)
        if mode not in ("max", "min"):
            raise ValueError(f"CyclicTraining: mode must be 'max' or 'min'. Got {mode!r}")
        self.monitor, self.mode = monitor, mode
        self.visits = visits(plan, cycles, return_stage)

    @property
    def total_epochs(self) -> int:
        """`C sum(E_k) + (C - 1) E_return`."""
        between = self.return_stage.epochs if self.return_stage else 0
        return self.cycles * self.plan.epochs + (self.cycles - 1) * between

    def fit(
        self,
        model: keras.Model,
        x,
        y=None,
        *,
        optimizer: Callable[[Visit], keras.optimizers.Optimizer],
        compile_options: Mapping | None = None,
        callbacks: Callable[[Visit], list] | None = None,
        batch_norm_data=None,
        directory=None,
        verbose: int = 0,
        **fit_options,
    ) -> Result:
        """Train in place; a training killed before goes on from `directory`.

        A killed stage goes on at the epoch that was cut short (`callbacks.Resume`), and final
        weights are those of a training never killed, if the data depends on the epoch only
        (`shuffle=False`, or a data set that follows epochs). Epochs count on over all stages.

        Args:
            model: a quantized, calibrated model, or a model that holds some, such as
                `distillation.MutualDistiller`.
            x: as for `fit` of Keras.
            y: likewise.
            optimizer: makes a new optimizer for each stage, whose frozen parts are frozen then.
            compile_options: arguments of `compile`, such as loss and metrics.
            callbacks: makes the callbacks of a stage. Epochs count on over all stages, so schedules
                over the epochs of a `fit` (`StochasticPrecision`, `TemperatureAnnealing`,
                `DampenOscillations`) run once over all of them; what is done after the last epoch
                of a `fit` (`BatchNormReestimation`, `ExportGapMonitor`) ends each stage.
            batch_norm_data: images for batch norms; `None` for `x`. Of an iterator the first
                `reestimate_batches` batches are kept.
            directory: where log and snapshots lie, one for each training: `stages.json`,
                `epochs.json`. `None`: nothing is kept.
            verbose: as in `fit`; above 0 also prints each stage.
            **fit_options: other arguments of `fit`: batch_size, validation_data, shuffle.

        Raises:
            ValueError: options that stages decide, a model without quantizers or below the plan's
                bits, a directory of another plan, an optimizer used twice, `monitor` not logged.
        """
        wrong = [name for name in _FORBIDDEN if name in fit_options]
        if wrong:
            raise ValueError(f"CyclicTraining.fit: stages decide {', '.join(wrong)}; leave it out")
        validated = {"validation_data", "validation_split"} & fit_options.keys()
        if (self.monitor or "").startswith("val_") and not validated:
            raise ValueError(f"CyclicTraining.fit: {self.monitor} needs validation_data")
        stages.prepare(model, [visit.stage for visit in self.visits])
        if self.reestimate_batches:
            batch_norm_data = norms.kept(batch_norm_data, self.reestimate_batches)
        made: list = []

        def made_for(visit):
            fresh = optimizer(visit)
            if any(fresh is old for old in made):
                raise ValueError(
                    "CyclicTraining.fit: optimizer must make a new one for each stage. Got the "
                    "same object twice"
                )
            made.append(fresh)
            return fresh

        def train(visit, folder, resume):
            stages.set_bits(model, visit.stage)
            with stages.frozen(model, visit.stage):
                # Behind the freezing: it may ask what there is to train.
                fresh = made_for(visit)
                if self.reestimate_batches:
                    data = x if batch_norm_data is None else batch_norm_data
                    size = fit_options.get("batch_size") or 32
                    if hasattr(data, "follow_epochs"):  # where a resumed run finds it at 0
                        data.epoch = visit.first_epoch
                    norms.reestimate(model, data, self.reestimate_batches, size)
                model.compile(optimizer=fresh, **(compile_options or {}))
                # A backup of Keras may have left its own in the model, or in the stage before.
                forget_initial_epoch(model)
                given = list(callbacks(visit)) if callbacks else []
                own = [files.EpochLog(folder / "epochs.json", visit.index)]
                if resume is not None:
                    counting = [one for one in given if hasattr(one, "get_state")]
                    own.append(Resume(resume, keep=True, also=counting))
                model.fit(
                    x,
                    y,
                    epochs=visit.first_epoch + visit.stage.epochs,
                    initial_epoch=visit.first_epoch,
                    callbacks=[_Whole(given, self.total_epochs), *given, *own],
                    verbose=verbose,
                    **fit_options,
                )

        with _folder(directory) as folder:
            return self._run(model, train, folder, resumes=directory is not None, verbose=verbose)

    def _run(self, model, train, folder, *, resumes, verbose) -> Result:
        rows = self._rows_of(folder)
        if rows:
            files.read_state(model, _exit(folder, len(rows) - 1))
            stages.set_bits(model, self.visits[len(rows) - 1].stage)
        for visit in self.visits[len(rows) :]:
            snapshots = folder / f"stage_{visit.index:03d}"
            if verbose:
                print(f"Cycle {visit.cycle}, stage {visit.stage.name} {visit.stage.bits}")
            train(visit, folder, snapshots if resumes else None)
            rows = [*rows, self._row(visit, folder)]
            # In this order a kill between two lines repeats work, and loses none.
            files.write_state(model, _exit(folder, visit.index))
            files.write_json(self._log(rows), folder / "stages.json")
            shutil.rmtree(snapshots, ignore_errors=True)
            if visit.index and not self.visits[visit.index - 1].ends_cycle:
                _exit(folder, visit.index - 1).unlink(missing_ok=True)
        best = self._best(rows)
        if best != self.visits[-1]:
            files.read_state(model, _exit(folder, best.index))
        return Result(tuple(rows), self.total_epochs, best.cycle)

    def _row(self, visit, folder):
        epochs = files.read_epochs(folder / "epochs.json")
        last = next(row for row in reversed(epochs) if row["stage"] == visit.index)
        if self.monitor is not None and self.monitor not in last:
            logged = sorted(set(last) - {"epoch", "stage"})
            raise ValueError(
                f"CyclicTraining: monitor {self.monitor!r} is not in the logs: {logged}"
            )
        stage = dataclasses.asdict(visit.stage)
        place = {"index": visit.index, "cycle": visit.cycle, "first_epoch": visit.first_epoch}
        return {**place, **stage, "logs": {k: last[k] for k in last if k not in ("epoch", "stage")}}

    def _best(self, rows) -> Visit:
        """The visit that ends the best cycle; the first of equals."""
        ends = [visit for visit in self.visits if visit.ends_cycle]
        if self.monitor is None:
            return ends[-1]
        sign = 1.0 if self.mode == "max" else -1.0

        def value(visit):
            found = sign * rows[visit.index]["logs"][self.monitor]
            return -math.inf if math.isnan(found) else found

        return max(ends, key=value)

    def _log(self, rows):
        return {"plan": self._fingerprint(), "total_epochs": self.total_epochs, "stages": rows}

    def _fingerprint(self):
        made = [dataclasses.asdict(visit) for visit in self.visits]
        return files.plain(made)

    def _rows_of(self, folder):
        stored = files.read_stages(folder / "stages.json")
        if stored is None:
            return []
        if stored["plan"] != self._fingerprint():
            raise ValueError(
                f"CyclicTraining: {folder} holds a training of another plan. Give each training a "
                "directory of its own"
            )
        return stored["stages"]


class _Whole(keras.callbacks.Callback):
    """Tells callbacks behind it the epochs of the whole training, which `fit` does not know.

    Those with `ends_each_fit` go on by the stage's own.
    """

    def __init__(self, callbacks, epochs):
        super().__init__()
        self.callbacks, self.epochs = callbacks, epochs

    def on_train_begin(self, logs=None):
        for callback in self.callbacks:
            if not getattr(callback, "ends_each_fit", False):
                callback.set_params({**self.params, "epochs": self.epochs})


def _exit(folder, index) -> Path:
    return folder / f"exit_{index:03d}.npz"


@contextlib.contextmanager
def _folder(directory):
    """The directory, made if absent, or one that goes when training ends."""
    if directory is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"CyclicTraining.fit: {folder} is a file; give a directory")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
