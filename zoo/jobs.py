"""Runs of `keras-lowbit train`, one after the other or several at a time, inside a time limit."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

# What numerical libraries take their number of threads from.
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


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

    @property
    def log(self) -> Path:
        """What the run prints, where several run at a time."""
        return self.out.with_suffix(".log")


def add_arguments(parser) -> None:
    """What all scripts that train take."""
    parser.add_argument("--data", default="", help="instead of the recipes' data")
    parser.add_argument("--weights", default="", help="float weights for all recipes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit for all")
    parser.add_argument("--backend", default="tensorflow")
    parser.add_argument("--xla", default="", help="auto, on or off, instead of the recipes'")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="runs at a time, which share the cores; each prints to OUT/<run>.log",
    )


def run_jobs(jobs: Iterable[Job], given, after: Callable[[Job], None] = lambda job: None) -> None:
    """Run what is not done; at the limit runs under way are stopped, and their snapshots stay.

    Args:
        jobs: in order.
        given: parsed `add_arguments`.
        after: called with each job that is done, now or before, one at a time.

    An interrupt or SIGTERM ends the runs under way too; their snapshots stay.

    Raises:
        SystemExit: some job failed (the others ran), no run at a time, or SIGTERM.
    """
    if given.parallel < 1:
        sys.exit(f"--parallel must be at least 1. Got {given.parallel}")
    end = time.monotonic() + 60 * given.minutes
    shares: queue.Queue[list[int]] = queue.Queue()
    for share in shares_of(sorted(_cores()), given.parallel):
        shares.put(share)
    failed, running = [], _Running()
    with _sigterm_exits(), ThreadPoolExecutor(given.parallel) as pool:
        waiting = {pool.submit(_run, job, given, end, shares, running): job for job in jobs}
        try:
            for future in as_completed(waiting):
                job, code = waiting[future], future.result()
                if code is None:
                    print(f"{job.out.name}: not done in time; run the command again to go on")
                elif code:
                    failed.append(job.out.name)
                else:
                    after(job)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.kill()
            raise
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


class _Running:
    """Processes under way, to be killed from another thread than those that wait for them."""

    def __init__(self):
        self.processes: set[subprocess.Popen] = set()
        self.killed = threading.Event()

    @contextlib.contextmanager
    def held(self, process):
        """Adds a process; it is killed at the end of the `with` at the latest."""
        self.processes.add(process)
        if self.killed.is_set():  # it began while the others were killed
            process.kill()
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            self.processes.discard(process)

    def kill(self):
        """Kill them all, and what begins from now on."""
        self.killed.set()
        for process in tuple(self.processes):
            process.kill()


@contextlib.contextmanager
def _sigterm_exits():
    """SIGTERM raises SystemExit in the main thread, where it would leave the runs without end."""

    def leave(number, frame):
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def shares_of(cores: list[int], parts: int) -> list[list[int]]:
    """Cores of each of `parts`, even to one; with more parts than cores they meet on some."""
    parts_with_cores = [cores[i::parts] for i in range(parts)]
    return [share or [cores[i % len(cores)]] for i, share in enumerate(parts_with_cores)]


def command_of(job: Job, given) -> list[str]:
    """The command line of a job."""
    command = [sys.executable, "-m", "keras_lowbit.cli", "train", str(job.recipe)]
    command += ["--out", str(job.out), "--backend", given.backend, *job.arguments]
    for flag in ("data", "weights", "xla"):
        if getattr(given, flag):
            command += [f"--{flag}", getattr(given, flag)]
    return command


def _cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def _run(job, given, end, shares, running):
    """Exit code, 0 for what is done; `None`: not done at the time limit."""
    if job.is_done:
        print(f"{job.out.name}: done before, see {job.out}")
        return 0
    left = end - time.monotonic()
    if left <= 0:
        return None
    share = shares.get()
    try:
        with running.held(_started(job, given, share)) as process:
            return process.wait(None if math.isinf(left) else left)
    except subprocess.TimeoutExpired:
        return None
    finally:
        shares.put(share)


def _started(job, given, share):
    """The process of a job, on some cores where others run beside it."""
    command = command_of(job, given)
    if given.parallel == 1:
        process = subprocess.Popen(command)
    else:
        print(f"{job.out.name}: begins, see {job.log}", flush=True)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {name: str(len(share)) for name in _THREADS}
        with job.log.open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **threads}
            )
        if hasattr(os, "sched_setaffinity"):  # its threads, made later, stay there too
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, share)
    return process
