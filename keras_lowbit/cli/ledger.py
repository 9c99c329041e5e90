"""What is finished in the folder of a recipe's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keras_lowbit.cli import files

# What is there while the second model is trained; sections of a recipe that make the first.
_BEGUN = ("backup_model", "blocks")
_OF_FLOAT = ("data", "model", "pretrain")


class Stages:
    """What is finished in a folder, in `stages.json`; a folder belongs to one job.

    As long as it holds a trained float model and nothing else, another job that begins with that
    one may have it: what comes behind can be mended without training it again.
    """

    def __init__(self, out: Path, job: dict):
        self.path = out / "stages.json"
        self.found = files.read_json(self.path) or {"job": job, "done": {}}
        parts = [self.found.get(key) for key in ("job", "done")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{self.path} is damaged (no job and what is done). Remove it")
        if self.found["job"] != job and self._is_a_start(out, job):
            self.found["job"] = job
        if self.found["job"] != job:
            raise ValueError(
                f"{out} holds results of another recipe or backend "
                f"({_difference(self.found['job'], job)}). Give another --out, or remove it"
            )

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
    return {**job, "recipe": {**sections, "seed": (recipe.get("train") or {}).get("seed")}}


def _difference(old, new, prefix=""):
    """The first setting that differs, as `train.epochs: 3, now 4`."""
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            return _difference(a, b, f"{prefix}{key}.")
        if a != b:
            return f"{prefix}{key}: {a!r}, now {b!r}"
    return ""
