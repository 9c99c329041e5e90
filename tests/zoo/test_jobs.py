"""The runner of trainings, with small programs in place of trainings."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.zoo.scripts import script

pytestmark = pytest.mark.once
# Notes when it began and on how many cores, then does what it is told.
PROGRAM = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "began").write_text(f"{time.time()} {os.environ.get('OMP_NUM_THREADS')}")
print("hello from", out.name)
"""
DONE = "(out / 'metrics.json').write_text('{}')"


@pytest.fixture
def jobs(monkeypatch):
    module = script("jobs")
    monkeypatch.setattr(
        module,
        "command_of",
        lambda job, given: [sys.executable, "-c", PROGRAM + job.arguments[0], str(job.out)],
    )
    return module


def given(jobs, tmp_path, *flags):
    parser = argparse.ArgumentParser()
    jobs.add_arguments(parser)
    return parser.parse_args(["--out", str(tmp_path), *flags])


def made(jobs, tmp_path, **programs):
    return [jobs.Job(Path("x.toml"), tmp_path / k, (text,)) for k, text in programs.items()]


def begun(tmp_path):
    times = {p.parent.name: p.read_text().split() for p in tmp_path.glob("*/began")}
    return {name: float(when) for name, (when, _) in times.items()}


def test_a_command_line_names_recipe_folder_backend_and_data(tmp_path):
    module = script("jobs")
    job = module.Job(Path("a.toml"), tmp_path / "a", ("--seed=2",))
    command = module.command_of(job, given(module, tmp_path, "--data", "x.npz", "--xla", "off"))
    assert command[1:] == [
        *("-m", "keras_lowbit.cli", "train", "a.toml", "--out", str(tmp_path / "a")),
        *("--backend", "tensorflow", "--seed=2", "--data", "x.npz", "--xla", "off"),
    ]


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_every_job_runs_once_and_what_is_done_is_only_told(jobs, tmp_path, parallel, capfd):
    todo = made(jobs, tmp_path, a=DONE, b=DONE, c=DONE)
    told = []
    options = given(jobs, tmp_path, "--parallel", parallel)
    jobs.run_jobs(todo, options, lambda job: told.append(job.out.name))
    assert sorted(told) == ["a", "b", "c"]
    first = begun(tmp_path)
    assert set(first) == {"a", "b", "c"}
    jobs.run_jobs(todo, options, lambda job: told.append(job.out.name))
    assert sorted(told) == ["a", "a", "b", "b", "c", "c"]
    assert begun(tmp_path) == first
    if parallel == "2":
        assert (tmp_path / "a.log").read_text() == "hello from a\n"
    else:
        assert "hello from a" in capfd.readouterr().out


def test_two_at_a_time_share_the_cores(jobs, tmp_path):
    """Each waits until the other has begun: one after the other would wait for good."""
    meet = DONE + "\nwhile len(list(out.parent.glob('*/began'))) < 2: time.sleep(0.01)"
    jobs.run_jobs(made(jobs, tmp_path, a=meet, b=meet), given(jobs, tmp_path, "--parallel", "2"))
    cores = len(jobs._cores())
    threads = sum(int(p.read_text().split()[1]) for p in tmp_path.glob("*/began"))
    assert threads == max(cores, 2)


def test_cores_are_dealt_out_evenly(jobs):
    assert jobs.shares_of([0, 1, 2, 3], 2) == [[0, 2], [1, 3]]
    assert jobs.shares_of([0, 1, 2], 2) == [[0, 2], [1]]
    assert jobs.shares_of([4, 5], 3) == [[4], [5], [4]]


def test_a_job_that_fails_is_named_and_the_others_run(jobs, tmp_path):
    todo = made(jobs, tmp_path, bad="sys.exit(3)", good=DONE)
    told = []
    with pytest.raises(SystemExit, match="failed: bad"):
        jobs.run_jobs(todo, given(jobs, tmp_path), lambda job: told.append(job.out.name))
    assert told == ["good"]


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_the_time_limit_stops_what_runs_and_begins_nothing_more(jobs, tmp_path, capsys, parallel):
    todo = made(jobs, tmp_path, a="time.sleep(60)", b="time.sleep(60)", c=DONE)
    start = time.monotonic()
    jobs.run_jobs(todo, given(jobs, tmp_path, "--minutes", "0.05", "--parallel", parallel))
    assert time.monotonic() - start < 30
    assert "c" not in begun(tmp_path)
    assert "a: not done in time; run the command again to go on" in capsys.readouterr().out


def test_no_run_at_a_time_is_refused(jobs, tmp_path):
    with pytest.raises(SystemExit, match=r"--parallel must be at least 1\. Got 0"):
        jobs.run_jobs([], given(jobs, tmp_path, "--parallel", "0"))


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_sigterm_ends_the_runs_under_way_too(jobs, tmp_path, parallel):
    """Each notes its process, then sleeps for longer than the test may take."""
    note = "(out / 'pid').write_text(str(os.getpid())); time.sleep(600)"
    todo = made(jobs, tmp_path, a=note, b=note, c=note)

    def terminate():
        while sum(bool(p.read_text()) for p in tmp_path.glob("*/pid")) < int(parallel):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as found:
        jobs.run_jobs(todo, given(jobs, tmp_path, "--parallel", parallel))
    assert found.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - start < 60
    assert len(list(tmp_path.glob("*/pid"))) == int(parallel)
    for path in tmp_path.glob("*/pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before
