"""`keras-lowbit COMMAND ...`: dispatch, one-line errors and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags

from keras_lowbit_cli.commands import COMMANDS, group, help_of, overview

BROKEN_TRAINING, BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 130, 141, 143
_DEBUG = "--debug"
_HELP = ("--help", "-h", "-help", "help")


class Terminated(KeyboardInterrupt):
    """SIGTERM: of `kill`, of a queue whose time is up, of a machine that is taken away."""


def entry() -> None:
    """The program: `sys.argv` in, `SystemExit` out."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # who started us may ignore it
        signal.signal(signal.SIGTERM, _terminate)
    # absl starts and ends the program; its own flags keep their defaults, ours are parsed below.
    app.run(
        lambda argv: main(argv[1:]),
        argv=[sys.argv[0], *sys.argv[1:]],
        flags_parser=lambda argv: [*flags.FLAGS([argv[0], "--verbosity=-1"]), *argv[1:]],
    )


def main(argv: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    with _streams():
        return _answered(argv)


@contextlib.contextmanager
def _streams():
    """Stand-ins for stdout and stderr where the process has none (`2>&-`, daemons, pythonw).

    Python has `None` for them: Keras writes to it, and `print` takes stdout in its place. The
    stand-in also takes the number of a closed stream, to which native code writes its log; the
    next file that is opened would get it.
    """
    with contextlib.ExitStack() as opened:
        for name, redirect in (
            ("stdout", contextlib.redirect_stdout),
            ("stderr", contextlib.redirect_stderr),
        ):
            if getattr(sys, name) is None:
                nowhere = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
                opened.enter_context(redirect(nowhere))
        yield


def _answered(argv):
    try:
        return _run(argv)
    except KeyboardInterrupt as error:
        how, code = _ENDS[isinstance(error, Terminated)]
        return _complain(f"{how}; the same command goes on or starts again", code)
    except BrokenPipeError:
        # Whoever read our output is gone; Python must not fail once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        if _DEBUG in argv:
            traceback.print_exc()
        return _complain(one_line(error), code)


_ENDS = (("interrupted", INTERRUPTED), ("terminated", TERMINATED))


def _terminate(*_):
    # As an exception it passes what cleans up: no partial file, no memory map stays behind.
    raise Terminated


def _run(argv):
    if not argv or argv[0] in _HELP:
        print(overview())
        return 0 if argv else BAD_INPUT
    if argv[0] == "--version":
        print(_version())
        return 0
    together = group(argv[0])
    if together and (len(argv) == 1 or argv[1] in _HELP):
        print(overview(together))
        return 0 if argv[1:] else BAD_INPUT
    words = 2 if together else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}.{_nearest(name)}")
    command = COMMANDS[name]
    values = command.flags()
    positional = values([name, *rest])[1:]
    if values["help"].value:
        print(help_of(command))
        return 0
    optional = command.argument.startswith("[")
    if len(positional) > 1 or not (positional or optional):
        given = " ".join(positional) or "nothing"
        raise ValueError(
            f"keras-lowbit {name} takes one {command.argument}. Got {given}; see --help"
        )
    _choose_backend(values.backend)
    # TensorFlow counts the retraces of a program that runs several models, and prints each.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    handlers = importlib.import_module("keras_lowbit.cli.handlers")
    return getattr(handlers, command.function)(positional[0] if positional else "", values)


def _version():
    """`keras_lowbit.__version__`, read from the file because importing it imports Keras."""
    source = Path(importlib.util.find_spec("keras_lowbit").origin).read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def _choose_backend(wanted):
    """Set the backend before Keras is imported, or refuse another one afterwards."""
    if not wanted:
        return
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = wanted
    import keras

    if keras.backend.backend() != wanted:
        raise ValueError(
            f"--backend {wanted}: Keras runs on {keras.backend.backend()} in this process already"
        )


def _nearest(name):
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(COMMANDS)}"


def _code_of(error):
    """Exit code of an error that the user can mend; `None` for a fault of ours."""
    if isinstance(error, (ValueError, OSError, ImportError, flags.Error)):
        return BAD_INPUT
    # Training that broke: named by its layer or block, and no fault of what was given.
    return BROKEN_TRAINING if isinstance(error, (FloatingPointError, *_scale_errors())) else None


def _scale_errors():
    """`ScaleError`, once something imported it: nobody raises it before, and it imports Keras."""
    guard = sys.modules.get("keras_lowbit.callbacks.scale_guard")
    return [guard.ScaleError] if guard else []


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; system errors name their file first."""
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line if line.endswith((":", ".", ",")) else f"{line};" for line in lines)
    return text.rstrip(";") or type(error).__name__


def _complain(text, code):
    print(f"error: {text}", file=sys.stderr)
    return code
