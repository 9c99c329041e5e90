"""Running a recipe: data, float model, quantization, `fit`, files and metrics."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import time
from pathlib import Path

import keras
import numpy as np

import tflite_export
from keras_lowbit import data as datasets
from keras_lowbit.cli import files, ledger, measure, preflight
from keras_lowbit.cli.fitting import fit, read_history
from keras_lowbit.cli.making import float_model, folded, quantized
from keras_lowbit.cli.pixels import Intake
from keras_lowbit.cli.preflight import of_section
from keras_lowbit.cli.recipe import Recipe, changed
from keras_lowbit.cli.report import report, versions
from keras_lowbit.transform import snap_biases, snap_levels
from keras_lowbit.tuning import reconstruct, refine
from tflite_export import runtime

_HISTORIES = {"model": "history.csv", "float": "history_float.csv"}


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    data: str = "",
    weights: str = "",
    resume: bool = True,
    verbose: int = 1,
    tune: bool = False,
) -> dict:
    """Make the model of a recipe in folder `out` and return its metrics.

    Writes `model.keras` (latents included), `float.keras` where the float model was trained,
    `model_<weights>.tflite`, `history.csv` and `metrics.json`. Started again with the same folder,
    a killed run goes on where it was and keeps the stages that are finished. A model whose file is
    gone is trained again, and what was made of it is made again. With another `[export]` the
    trained models stay, the files that it lists are made, and others of before lie beside them.

    The images set aside by `data.holdout` are measured after each epoch; the test images are
    looked at once, when everything is done.

    Args:
        recipe: `recipe.Recipe`.
        out: folder for results; made if absent.
        data: overrides `recipe.data.name`.
        weights: overrides `recipe.model.weights`.
        resume: keep snapshots to go on from.
        verbose: as in `fit` of Keras; 0 prints nothing.
        tune: measure on the held-out images and leave the test images alone.

    Raises:
        ValueError: whatever the recipe, the data or the weights have wrong; `out` holds the
            results of another recipe, of other images or weights, or another run is at work there.
        ImportError: files are to be written, and the `tflite` extra is not installed.
        OSError: the disk is full.
    """
    out = Path(out)
    recipe = changed(recipe, data=data or None, weights=weights or None)
    if tune and not recipe.data.holdout:
        raise ValueError(f"{recipe.name}: tuning needs [data] holdout above 0")
    given = recipe.model
    if recipe.train.distill and not (
        given.weights
        or recipe.pretrain.epochs
        or Path(given.architecture).suffix
        or recipe.train.teacher
    ):
        raise ValueError(
            f"{recipe.name} [train]: distill needs a trained float model. Give [pretrain] epochs, "
            "weights or a teacher"
        )
    settings = dataclasses.asdict(recipe)
    settings["export"]["weights"] = list(settings["export"]["weights"])
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; results need a folder")
    keras.utils.set_random_seed(recipe.train.seed)
    with of_section(recipe, "data"):
        dataset = datasets.load(
            recipe.data.name, size=recipe.data.size or None, channels=recipe.data.channels
        )
        chosen = dataset
        if recipe.data.holdout:
            chosen = datasets.holdout(dataset, recipe.data.holdout, recipe.data.seed)
    with of_section(recipe, "model"):
        model = float_model(recipe, dataset)
    named = recipe.train.teacher
    with of_section(recipe, "train"):
        teacher = files.build_teacher(named, model) if named else None
    job = {"recipe": settings, "backend": keras.backend.backend(), "tune": tune}
    job["contents"] = ledger.contents(recipe, dataset)
    if "model" not in ledger.Stages(out, job).found["done"]:
        preflight.check(recipe, chosen, model)
    with ledger.alone_in(out):
        stages = ledger.Stages(out, job)
        for name in _HISTORIES.values():
            read_history(out / name)  # a damaged one must not wait until training is over
        return _Run(recipe, out, stages, chosen, resume, verbose, teacher).finish(
            model, chosen if tune else dataset
        )


@dataclasses.dataclass
class _Run:
    recipe: Recipe
    out: Path
    stages: ledger.Stages
    chosen: datasets.Dataset
    resume: bool
    verbose: int
    teacher: keras.Model | None  # in place of the float model, where logits are distilled

    def finish(self, model, judged) -> dict:
        """All stages in order; the metrics."""
        say = print if self.verbose else lambda *_: None
        model = self._trained("float", model, self.recipe.pretrain, None)
        trained = {"float": model}
        results = {}
        if self.recipe.scheme is not None:
            if self.recipe.model.fold:
                model = folded(model, self.recipe, self.chosen)
            made = self.out / "model.keras"
            student = None if made.is_file() else self._student(model)
            student = self._trained("model", student, self.recipe.train, model)
            trained["quantized"] = student
            results = {w: self._exported(student, w) for w in self.recipe.export.weights}
        else:
            trained["float"] = self._trained("model", model, self.recipe.train, None)
        metrics = self._metrics(trained, results, judged)
        files.write_json(metrics, self.out / "metrics.json")
        say(report(metrics, self.out))
        return metrics

    def _trained(self, name, model, train, original):
        """The model after a `fit`, from its file where that is finished.

        `original`: the float model that a quantized one is made of.
        """
        path = self.out / f"{name}.keras"
        if name == "float" and not train.epochs:
            return model
        # The entry and the file: a file alone may be of a run that was cut short.
        if name in self.stages.found["done"] and path.is_file():
            model = files.load_model(path)
            self._drop_snapshots(name)
            return model
        # Before it is trained: a run that is cut short must not find the results of the last one.
        self.stages.forget_from(name)
        if name == "float":
            self._drop_snapshots("model")  # of a student of another float model
        if model is None:
            model = self._student(original)
        backup = self.out / f"backup_{name}"

        def work():
            started = time.perf_counter()
            if name == "model" and original is not None:
                self._reconstructed(model, original)
            if train.epochs:
                fit(
                    model,
                    train,
                    self.chosen,
                    methods=self.recipe.methods if name == "model" else None,
                    teacher=self.teacher or original,
                    held_out=self.chosen if self.recipe.data.holdout else None,
                    history=self._history(name),
                    backup=backup if self.resume else None,
                    verbose=self.verbose,
                )
            if self.recipe.quantize.kernel == "levels" and name == "model":
                snap_levels(model)
            # Measured against its files below; a float model stays as it is.
            files.save(snap_biases(model), path)
            return {"seconds": round(time.perf_counter() - started, 1)}

        self.stages.once(name, work, path)
        self._drop_snapshots(name)
        return model

    def _student(self, original):
        """The quantized model, with the random state that it has where nothing was killed."""
        # Dropout draws its seeds now, and a float model from its file has drawn others before.
        keras.utils.set_random_seed(self.recipe.train.seed)
        return quantized(original, self.recipe, self.chosen)

    def _drop_snapshots(self, name):
        # Blocks are the quantized model's: a float one that is finished leaves them.
        for folder in (f"backup_{name}", *(["blocks"] if name == "model" else [])):
            shutil.rmtree(self.out / folder, ignore_errors=True)

    def _reconstructed(self, model, teacher):
        """Like the float model block by block, then as a whole, in place, as the recipe says."""
        given, whole, seed = self.recipe.reconstruct, self.recipe.refine, self.recipe.train.seed
        if not given.steps and not whole.steps:
            return
        images = np.asarray(self.chosen.x_train[: given.images or None], np.float32)
        images = datasets.zoomed_views(images, given.views, zoom=given.zoom, seed=seed)
        if given.steps:
            found = reconstruct(
                model,
                teacher,
                images,
                **given.planned,
                batch_size=given.batch_size,
                drop=given.drop,
                rounding=given.rounding,
                match_means=given.match_means,
                seed=seed,
                memory=given.memory * 2**30,
                folder=self.out / "blocks" if self.resume else None,
            )
            if self.verbose:
                print(found)
        if whole.steps:
            found = refine(
                model,
                teacher,
                images,
                steps=whole.steps,
                batch_size=whole.batch_size,
                rates=whole.all_rates,
                seed=seed,
            )
            if self.verbose:
                print(found)

    def _history(self, name):
        return self.out / _HISTORIES[name]

    def _file(self, weights):
        return self.out / f"model_{weights}.tflite"

    def _exported(self, model, weights):
        """The verified file; `None` where it is finished."""
        path = self._file(weights)
        export = self.recipe.export
        result = None
        made = self.stages.found["done"].get(f"file_{weights}")
        if made and path.is_file() and _sha256(path.read_bytes()) != made["sha256"]:
            # Cut short, or of another model: what was measured is of the file that was written.
            self.stages.forget(f"file_{weights}", f"accuracy_{weights}")

        def work():
            nonlocal result
            result = self._converted(model, weights)
            if export.verify_images:
                images = np.asarray(self.chosen.x_train[: export.verify_images])
                result = result.verified(Intake.of_graph(result.graph).fitted(images))
            with files.replacing(path) as temporary:
                temporary.write_bytes(result.content)
            return {
                "bytes": len(result.content),
                "sha256": _sha256(result.content),
                "wrong_codes": result.mismatches,
                "compared_codes": result.verification and result.verification.compared,
                "verify_images": export.verify_images,
            }

        self.stages.once(f"file_{weights}", work, path)
        return result

    def _converted(self, model, weights):
        export = self.recipe.export
        return tflite_export.convert(
            model,
            target=export.target,
            weights=weights,
            input_type=export.input_type or None,
            output_type=export.output_type,
        )

    def _metrics(self, models, results, judged):
        """Accuracies on the images that judge, through models and files."""
        answers = _Answers(models, judged.x_test)
        found = self._of_models(answers, judged.y_test)
        if results:
            found |= self._of_files(answers, results, judged.y_test)
        job, done = self.stages.found["job"], self.stages.found["done"]
        return {
            **job,
            "data": str(judged),
            "judged_on": "held-out images" if job["tune"] else "test images",
            "versions": versions(),
            "train_seconds": done["model"]["seconds"],
            "accuracy": found,
            "files": {self._file(w).name: done[f"file_{w}"] for w in results},
            "history": read_history(self._history("model")),
        }

    def _of_models(self, answers, y):
        """Scores of the Keras models, by name."""

        def scored(name):
            return measure.score(answers.of(name, what=f"measure the {name} model"), y)

        return {
            name: self.stages.once(f"accuracy_{name}", functools.partial(scored, name))
            for name in answers.models
        }

    def _of_files(self, answers, results, y):
        """Scores of the frozen model and of the files, by container of their weights."""

        def scored(path):
            content = path.read_bytes()
            session, intake = runtime.Session(content), Intake.of_file(content)
            said = measure.file_answers(session, answers.x, f"run {path.name}", intake=intake)
            return {
                **measure.score(said, y),
                "agreement": float((said == answers.of("quantized")).mean()),
                "float_agreement": float((said == answers.of("float")).mean()),
            }

        student = answers.models["quantized"]
        frozen = functools.partial(self._frozen, student, results, answers.x, y)
        found = {"frozen": self.stages.once("accuracy_frozen", frozen)}
        for weights in results:
            of_file = functools.partial(scored, self._file(weights))
            found[weights] = self.stages.once(f"accuracy_{weights}", of_file)
        return found

    def _frozen(self, model, results, x, y):
        first, result = next(iter(results.items()))
        if result is None:
            result = self._converted(model, first)
        answers = measure.keras_answers(result.frozen, x, what="measure the frozen model")
        return measure.score(answers, y)


class _Answers:
    """What models say of the images `x`: each is asked once, when somebody wants to know."""

    def __init__(self, models, x):
        self.models, self.x = models, x
        self._known = {}

    def of(self, name, what=""):
        """The classes that a model finds; `what` is shown meanwhile."""
        if name not in self._known:
            self._known[name] = measure.keras_answers(self.models[name], self.x, what=what)
        return self._known[name]


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
