"""What is finished in the folder of a recipe's results."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from keras_lowbit.cli import files
from keras_lowbit.paths import expanded

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What is there while the second model is trained; sections of a recipe that make the first.
_BEGUN = ("backup_model", "blocks")
_OF_FLOAT = ("data", "model", "pretrain")
# What is made of a job's images and models alone, whatever files are written.
_WITHOUT_FILES = ("float", "model", "accuracy_float", "accuracy_quantized")
_LOOKED_AT = 16  # images of each part of a data set


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; the end of the process lets them in.

    Where the system or the disk has no locks, nothing is kept out.

    Raises:
        ValueError: another run is there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = out / ".lock"
    with _locked(lock):
        yield
        # Still locked: whoever has opened it by now sees that it is another one's. The file of a
        # killed run stays, and locks nothing.
        if fcntl is not None:
            lock.unlink(missing_ok=True)


def _locked(lock):
    """The open file of a lock that nobody else holds."""
    while True:
        file = lock.open("w")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"Another run is at work in {lock.parent}. Wait for its end, or give another --out"
            ) from None
        except OSError:
            return file  # no locks on this disk
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()  # of a run that ended between the two calls, and took the name with it


def contents(recipe, dataset) -> dict[str, str]:
    """What lies behind the names in a recipe: a digest of each.

    Of images it is of their number and size, of all labels and of 16 images of each part, spread
    over it; of files it is of all bytes.

    Args:
        recipe: `recipe.Recipe`.
        dataset: `data.Dataset`.
    """
    found = {"data": _digest(_of_images(dataset))}
    named = {
        "architecture": recipe.model.architecture,
        "weights": recipe.model.weights,
        "teacher": recipe.train.teacher,
    }
    for key, name in named.items():
        path = expanded(name)
        if name and path.is_file():
            found[key] = _digest([path.read_bytes()])
    return found


def _of_images(dataset):
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        yield repr((tuple(x.shape), str(x.dtype))).encode()
        yield np.ascontiguousarray(y).tobytes()
        for place in np.linspace(0, len(x) - 1, min(len(x), _LOOKED_AT)).astype(int):
            yield np.ascontiguousarray(x[place : place + 1]).tobytes()


def _digest(parts):
    made = hashlib.sha256()
    for part in parts:
        made.update(part)
    return made.hexdigest()[:16]


class Stages:
    """What is finished in a folder, in `stages.json`; a folder belongs to one job.

    As long as it holds a trained float model and nothing else, another job that begins with that
    one may have it: what comes behind can be mended without training it again. So may a job of
    another `[export]`, which forgets the files and what was measured of them.
    """

    def __init__(self, out: Path, job: dict):
        self.path = out / "stages.json"
        self.found = files.read_json(self.path) or {"job": job, "done": {}}
        parts = [self.found.get(key) for key in ("job", "done")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{self.path} is damaged (no job and what is done). Remove it")
        _lower_names(self.found["job"])
        if self.found["job"] != job and self._is_a_start(out, job):
            self.found["job"] = job
        old, new = _without_export(self.found["job"]), _without_export(job)
        if old != new:
            raise ValueError(
                f"{out} holds results of another recipe, backend, data or weights "
                f"({_difference(old, new)}). Give another --out, or remove it"
            )
        if self.found["job"] != job:
            done = self.found["done"]
            kept = {name: done[name] for name in _WITHOUT_FILES if name in done}
            self.found = {"job": job, "done": kept}

    def _is_a_start(self, out, job):
        begun = any((out / name).exists() for name in _BEGUN)
        only_float = self.found["done"].keys() <= {"float"} and not begun
        return only_float and _of_float(self.found["job"]) == _of_float(job)

    def once(self, name: str, work: Callable[[], dict], *made: Path) -> dict:
        """What `work` returned, now or in an earlier run whose files `made` are still there."""
        done = self.found["done"]
        if name not in done or not all(path.is_file() for path in made):
            done[name] = work()
            files.write_json(self.found, self.path)
        return done[name]

    def forget(self, *names: str) -> None:
        """Drop results."""
        for name in names:
            self.found["done"].pop(name, None)
        files.write_json(self.found, self.path)

    def forget_from(self, name: str) -> None:
        """Drop the results of a model, `"float"` or `"model"`, and of all that was made of it."""
        done = self.found["done"]
        kept = {key: done[key] for key in ("float",) if key != name and key in done}
        if kept != done:
            self.found["done"] = kept
            files.write_json(self.found, self.path)


def _of_float(job):
    """What the float model of a job depends on."""
    recipe = job.get("recipe")
    if not isinstance(recipe, dict):
        return job
    sections = {name: recipe.get(name) for name in _OF_FLOAT}
    behind = {k: v for k, v in (job.get("contents") or {}).items() if k != "teacher"}
    seed = (recipe.get("train") or {}).get("seed")
    return {**job, "contents": behind, "recipe": {**sections, "seed": seed}}


def _lower_names(job):
    """Names of quantizers as recipes have them now; jobs of before hold them as written."""
    recipe = job.get("recipe")
    quantize = recipe.get("quantize") if isinstance(recipe, dict) else None
    for key in ("kernel", "activation"):
        if isinstance(quantize, dict) and isinstance(quantize.get(key), str):
            quantize[key] = quantize[key].lower()


def _without_export(job):
    """What the models of a job depend on."""
    recipe = job.get("recipe")
    if not isinstance(recipe, dict):
        return job
    return {**job, "recipe": {name: recipe[name] for name in recipe if name != "export"}}


def _difference(old, new, prefix=""):
    """The first setting that differs, as `train.epochs: 3, now 4`."""
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            return _difference(a, b, f"{prefix}{key}.")
        if a != b:
            return f"{prefix}{key}: {a!r}, now {b!r}"
    return ""
