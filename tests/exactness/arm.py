"""The aarch64 runtime on another processor: a root of Debian's packages under qemu-user.

    python -m tests.exactness.arm            builds the root in `.arm/`, once

Needs apt and pip; installs nothing outside `.arm/`.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

ARM = Path(__file__).parents[2] / ".arm"
ROOT = ARM / "root"
QEMU = ARM / "host/usr/bin/qemu-aarch64-static"
READY = ARM / "ready"
PYTHON = "python3.11"
WHEELS = ("ai-edge-litert", "numpy")

# The runtime reads its features here and crashes without the file. No i8mm: qemu 7.2 computes
# garbage with it.
_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""  # noqa: E501

# Runs in the aarch64 Python: files and inputs from a pickle, outputs into another.
_RUNNER = """
import pickle, sys, platform
assert platform.machine() == "aarch64"
from ai_edge_litert import interpreter as litert
jobs = pickle.load(open(sys.argv[1], "rb"))
results = []
for content, inputs in jobs:
    interpreter = litert.Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    details = {d["name"]: d for d in interpreter.get_input_details()}
    batch = next(iter(details.values()))["shape"][0]
    count = len(next(iter(inputs.values())))
    found = {d["name"]: [] for d in interpreter.get_output_details()}
    for start in range(0, count, batch):
        for name, array in inputs.items():
            interpreter.set_tensor(details[name]["index"], array[start : start + batch])
        interpreter.invoke()
        for d in interpreter.get_output_details():
            found[d["name"]].append(interpreter.get_tensor(d["index"]).copy())
    results.append(found)
pickle.dump(results, open(sys.argv[2], "wb"), protocol=4)
"""


def build_root() -> None:
    """Fill `.arm/`: qemu, an aarch64 Python and the aarch64 wheel of the installed LiteRT."""
    if READY.exists():
        return
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"make test-arm needs {tool}: run it on Debian or Ubuntu.")
    _packages()
    _wheels()
    (ROOT / "proc").mkdir(exist_ok=True)
    (ROOT / "proc/cpuinfo").write_text(_CPUINFO)
    (ROOT / "runner.py").write_text(_RUNNER)
    READY.touch()


def _packages():
    host = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    apt = ARM / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": host,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
    }
    command = ["apt-get", "-q", "-y"]
    for key, value in settings.items():
        command += ["-o", f"{key}={value}"]
    for arch in (host, "arm64"):
        command += ["-o", f"APT::Architectures::={arch}"]
    _run([*command, "update"])
    wanted = ["qemu-user-static", *(f"{p}:arm64" for p in (PYTHON, "libstdc++6", "libgomp1"))]
    _run([*command, "install", "--download-only", "--no-install-recommends", *wanted])
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        if package.name.endswith("_arm64.deb"):
            _run(["dpkg-deb", "-x", package, ROOT])
        elif package.name.startswith("qemu-user-static"):
            _run(["dpkg-deb", "-x", package, ARM / "host"])
    shutil.rmtree(apt)


def _wheels():
    pinned = [f"{name}=={version(name)}" for name in WHEELS]
    where = ["--platform", "manylinux_2_27_aarch64", "--platform", "manylinux2014_aarch64"]
    where += ["--platform", "manylinux_2_28_aarch64", "--python-version", "3.11"]
    target = ROOT / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--upgrade"]
    _run([*pip, "--target", target, *where, *pinned])


def _run(command):
    print("+", *map(str, command[:2]), "...", command[-1], flush=True)
    subprocess.run([str(part) for part in command], check=True)


def available() -> str:
    """Why Arm files cannot run here; empty where they can."""
    return "" if READY.exists() else "no aarch64 root: run `make test-arm`"


def run(jobs, folder, *, cpu="neoverse-n1") -> list[dict]:
    """Outputs of `[(file content, inputs by name)]` in the aarch64 runtime, by tensor name."""
    given, taken = Path(folder) / "jobs.pickle", Path(folder) / "results.pickle"
    with given.open("wb") as file:
        pickle.dump(jobs, file, protocol=4)
    command = [QEMU, "-cpu", cpu, "-L", ROOT, ROOT / f"usr/bin/{PYTHON}", ROOT / "runner.py"]
    environment = {
        "PYTHONPATH": str(ROOT / "site"),
        "PYTHONHOME": str(ROOT / "usr"),
        "PATH": os.environ["PATH"],
        "OPENBLAS_NUM_THREADS": "1",
    }
    made = subprocess.run(
        [str(part) for part in [*command, given, taken]],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(
            f"The aarch64 runtime failed ({made.returncode}):\n{made.stderr[-3000:]}"
        )
    with taken.open("rb") as file:
        results = pickle.load(file)
    return [{name: np.concatenate(parts) for name, parts in found.items()} for found in results]


if __name__ == "__main__":
    build_root()
