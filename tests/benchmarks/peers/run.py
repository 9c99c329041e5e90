"""One training step of each peer's ResNet-20, quantized over its own float net.

    make bench-peers [PEERS_ARGS="--peers Brevitas --rounds 7 --json peers.json"]

Each peer gets an environment of its own, `.venv-peers/<name>`, with the versions below, and is
timed there in one process, steps in turn. Only ratios compare between frameworks. What cannot be
installed or run is printed with the reason. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from keras_lowbit.progress import table

ROOT = Path(__file__).resolve().parents[3]
HOME = ROOT / ".venv-peers"
SECONDS = 3600  # no installation and no timing takes longer
# All are timed as `keras-lowbit train` trains: glibc keeps memory between steps (`cli.allocator`).
MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Peer:
    """A library to time.

    `requirements`: pinned, or none for the environment that runs this file. `script`: module of
    this folder. `variables`: of the environment.
    """

    script: str
    requirements: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


# tf-keras requires a package of the name "tensorflow".
KERAS_2 = ("tensorflow==2.21.0", "tf-keras==2.21.0")
PEERS = {
    "keras_lowbit-tensorflow": Peer("ours", variables={"KERAS_BACKEND": "tensorflow"}),
    "keras_lowbit-torch": Peer("ours", variables={"KERAS_BACKEND": "torch"}),
    "TFMOT": Peer("tfmot", (*KERAS_2, "tensorflow-model-optimization==0.8.1")),
    # QKeras imports pyparsing and names pyparser among its requirements.
    "QKeras": Peer(
        "qkeras",
        (*KERAS_2, "tensorflow-model-optimization==0.8.1", "pyparsing==3.1.4", "QKeras==0.9.0"),
    ),
    "Larq": Peer("larq", (*KERAS_2, "larq==0.14.0")),
    "HGQ2": Peer(
        "hgq2",
        ("tensorflow-cpu==2.21.0", "keras==3.15.1", "HGQ2==0.2.0"),
        {"KERAS_BACKEND": "tensorflow"},
    ),
    "Brevitas": Peer("brevitas", ("torch==2.13.0", "numpy==2.4.6", "brevitas==0.13.4")),
}


class Failed(Exception):
    """A command that did not end well; the message is what it said last."""


def call(command, seconds=SECONDS, **variables) -> None:
    """Run a command, or raise `Failed`."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {seconds} s") from None
    if done.returncode:
        raise Failed(last_error(done.stderr))


def last_error(text: str) -> str:
    """The line of an error output that says what went wrong: the last one that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or line.startswith("ERROR")]
    return (named or lines or ["it said nothing"])[-1][:300]


def python_of(name: str, requirements: tuple[str, ...], python: str) -> Path:
    """The interpreter of a peer's environment, made if it is missing or other versions are asked.

    Raises:
        Failed: the environment or the installation.
    """
    if not requirements:
        return Path(sys.executable)
    folder = HOME / name
    interpreter, stamp = folder / "bin" / "python", folder / ".installed"
    asked = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == asked:
        return interpreter
    call([python, "-m", "venv", "--clear", folder])
    call([interpreter, "-m", "pip", "install", "--quiet", *requirements])
    stamp.write_text(asked)
    return interpreter


def row_of(name: str, given) -> dict:
    """The row of a peer, or `{"peer", "reason"}`."""
    peer = PEERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "row.json"
        options = ["--json", kept, "--batch", given.batch, "--blocks", given.blocks]
        options += ["--rounds", given.rounds, *(["--forms", *given.forms] if given.forms else [])]
        try:
            interpreter = python_of(name, peer.requirements, given.python)
            module = f"tests.benchmarks.peers.{peer.script}"
            call([interpreter, "-m", module, *options], **MEMORY, **peer.variables)
        except Failed as failed:
            return {"peer": name, "reason": str(failed)}
        return json.loads(kept.read_text())


def cells(row: dict) -> tuple:
    """A line of the table."""
    if "reason" in row:
        return (row["peer"], "", "", "", "", row["reason"])
    best = {
        kind: min(ms for label, ms in row["ms"].items() if label.split(" ")[0] == kind)
        for kind in ("float", "quantized")
    }
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    times = (f"{best['float']:.0f}", f"{best['quantized']:.0f}", f"{row['ratio']:.2f}")
    return (row["peer"], row["scheme"], *times, versions)


COLUMNS = ("peer", "scheme", "float ms", "quantized ms", "speed over float", "versions")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    for name, value in (("batch", 128), ("blocks", 3), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--forms", nargs="+")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json")
    given = parser.parse_args()
    rows = []
    for name in given.peers:
        rows.append(row_of(name, given))
        print(json.dumps(rows[-1]), flush=True)
        if given.json:  # after each: the next may be killed
            Path(given.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(table("one training step", COLUMNS, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
