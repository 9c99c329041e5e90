"""Help, dispatch, exit codes and the start of a process."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import keras
import pytest

from keras_lowbit.callbacks.scale_guard import ScaleError
from keras_lowbit.cli import handlers
from keras_lowbit_cli.commands import COMMANDS
from keras_lowbit_cli.main import Terminated, one_line

pytestmark = pytest.mark.once


def program(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_lowbit_cli", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_help_names_every_command(run):
    outcome = run("--help")
    assert outcome.code == 0
    for command in COMMANDS.values():
        assert f"  {command.name} {command.argument}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("train --help", 0),
        ("zoo --help", 0),
        ("zoo export --help", 0),
        ("zoo export", 2),
        ("export", 2),
        ("export x --weights 3", 2),
    ],
)
def test_help_and_flag_errors_need_no_keras(line, code):
    """Keras takes seconds to import."""
    check = "from keras_lowbit_cli.main import main; code = main(sys.argv[1:])"
    check = f"import sys; {check}; print('keras' in sys.modules, code)"
    done = subprocess.run(
        [sys.executable, "-c", check, *line.split()], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"False {code}"


@pytest.mark.parametrize("line", [(), ("zoo",)])
def test_no_command_shows_the_help_and_fails(run, line):
    outcome = run(*line)
    assert (outcome.code, "usage: keras-lowbit" in outcome.out) == (2, True)


def test_help_of_a_group_names_its_commands_only(run):
    outcome = run("zoo", "--help")
    assert outcome.code == 0
    assert all(f"  zoo {name} " in outcome.out for name in ("list", "info", "export"))
    assert "  train " not in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command_names_its_flags(run, name, flag):
    outcome = run(*name.split(), flag)
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: keras-lowbit {name} {COMMANDS[name].argument}")
    for known in COMMANDS[name].flags():
        assert known == "h" or f"  --{known}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


@pytest.mark.parametrize("name", ["export", "zoo export"])
def test_help_says_when_a_file_with_other_codes_is_written(run, name):
    said = " ".join(run(*name.split(), "--help").out.split())
    assert "Exit code 1 if a code differs; then no file is written. --weights int4_all" in said
    assert "counts what differs, writes the file and ends with 0" in said


def test_every_command_has_a_function():
    assert all(callable(getattr(handlers, c.function)) for c in COMMANDS.values())


def test_version(run):
    import keras_lowbit

    assert run("--version").out.strip() == keras_lowbit.__version__


class NarrowerError(ScaleError):
    """One of ours by another name."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("bad\n  worse"), 2, "bad; worse"),
        (OSError(28, "No space left on device", "a.keras"), 2, "a.keras: No space left on device"),
        (ImportError("pip install x"), 2, "pip install x"),
        (ScaleError("Layer conv: NaN"), 1, "Layer conv: NaN"),
        (NarrowerError("Layer conv: NaN"), 1, "Layer conv: NaN"),
        (FloatingPointError("block stem is nan"), 1, "block stem is nan"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on or starts again"),
        (Terminated(), 143, "terminated; the same command goes on or starts again"),
    ],
)
def test_errors_have_an_exit_code_and_one_line(run, monkeypatch, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(handlers, "inspect", fail)
    outcome = run("inspect", "x")
    assert (outcome.code, outcome.err) == (code, f"error: {said}\n")


def test_a_fault_of_ours_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(handlers, "inspect", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        run("inspect", "x")


def test_an_error_that_only_shares_a_name_with_ours_is_a_fault(run, monkeypatch):
    stranger = type("ScaleError", (RuntimeError,), {})

    def fail(*_):
        raise stranger("a web service")

    monkeypatch.setattr(handlers, "inspect", fail)
    with pytest.raises(stranger):
        run("inspect", "x")


def test_debug_shows_the_traceback(run):
    outcome = run("inspect", "no.keras", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err


def test_lines_of_a_list_are_joined():
    text = "android has 2 objections:\n  a: no\n  b: no\nUse another."
    assert one_line(ValueError(text)) == "android has 2 objections: a: no; b: no; Use another."


def test_another_backend_is_refused_once_keras_runs(run):
    other = next(b for b in ("torch", "jax") if b != keras.backend.backend())
    outcome = run("inspect", "x.keras", "--backend", other)
    assert outcome.code == 2
    assert f"--backend {other}: Keras runs on {keras.backend.backend()}" in outcome.error


def test_a_process_ends_with_the_exit_code_and_one_line(tmp_path):
    done = program("inspect", str(tmp_path / "no.keras"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'no.keras'}: no such file"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_training_ends_by_a_signal_and_leaves_nothing_half_written(
    recipe, tmp_path, number, code, word
):
    out = tmp_path / "out"
    line = [sys.executable, "-m", "keras_lowbit_cli", "train"]
    line += [str(recipe()), "--out", str(out), "--epochs=100000"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not (out / "history.csv").is_file():
                time.sleep(0.05)
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    wanted = f"error: {word}; the same command goes on or starts again"
    assert (process.returncode, said.splitlines()[-1]) == (code, wanted)
    assert not [path.name for path in out.rglob("*.partial*")]


@pytest.mark.parametrize("more", [(), ("--debug",)])
def test_an_error_is_not_told_to_stdout_where_there_is_no_stderr(run, monkeypatch, more):
    monkeypatch.setattr(sys, "stderr", None)
    outcome = run("inspect", "no.keras", *more)
    assert (outcome.code, outcome.out, sys.stderr) == (2, "", None)


@pytest.mark.runtime
def test_a_model_is_measured_without_stderr(run, made, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    outcome = run("evaluate", made / "w4a4.keras", "--data=digits", "--images=20")
    assert outcome.code == 0
    assert "| quantized " in outcome.out


@pytest.mark.runtime
@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(("closed", "said"), [("2>&-", True), (">&- 2>&-", False)])
def test_a_process_needs_neither_stdout_nor_stderr(made, closed, said):
    command = [sys.executable, "-m", "keras_lowbit_cli", "evaluate", str(made / "w4a4.keras")]
    line = f"{shlex.join([*command, '--data=digits', '--images=20'])} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0
    assert ("| quantized " in done.stdout) == said


@pytest.mark.runtime
def test_the_backend_flag_decides_whatever_the_environment_says(recipe, tmp_path):
    wanted = "torch" if keras.backend.backend() == "jax" else "jax"
    pytest.importorskip(wanted)
    done = program("train", recipe(), "--out", tmp_path / "o", "--epochs=0", "--backend", wanted)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["backend"] == wanted
