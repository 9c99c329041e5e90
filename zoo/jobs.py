"""Runs of `keras-lowbit train`, one after the other, inside a time limit."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One run: a recipe, its results' folder, more arguments of the command."""

    recipe: Path
    out: Path
    arguments: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether a run before ended here."""
        return (self.out / "metrics.json").is_file()


def add_arguments(parser) -> None:
    """What all scripts that train take."""
    parser.add_argument("--data", default="", help="instead of the recipes' data")
    parser.add_argument("--weights", default="", help="float weights for all recipes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit for all")
    parser.add_argument("--backend", default="tensorflow")


def run_jobs(jobs: Iterable[Job], given, after: Callable[[Job], None] = lambda job: None) -> None:
    """Run what is not done; at the limit the run under way is stopped, and its snapshots stay.

    Args:
        jobs: in order.
        given: parsed `add_arguments`.
        after: called with each job that is done, now or before.

    Raises:
        SystemExit: some job failed; the others ran.
    """
    end = time.monotonic() + 60 * given.minutes
    failed = []
    for job in jobs:
        if job.is_done:
            print(f"{job.out.name}: done before, see {job.out}")
            after(job)
            continue
        command = [sys.executable, "-m", "keras_lowbit.cli", "train", str(job.recipe)]
        command += ["--out", str(job.out), "--backend", given.backend, *job.arguments]
        for flag in ("data", "weights"):
            if getattr(given, flag):
                command += [f"--{flag}", getattr(given, flag)]
        left = None if math.isinf(given.minutes) else max(end - time.monotonic(), 0.0)
        try:
            code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{job.out.name}: stopped at the time limit; run the command again to go on")
            break
        if code:
            failed.append(job.out.name)
        else:
            after(job)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
