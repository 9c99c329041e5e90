"""Who writes and reads no `.tflite` needs nothing of the extra `tflite`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runtime  # the folder `made` holds a file that LiteRT has seen

ROOT = Path(__file__).parents[2]
NEEDS = "pip install keras-lowbit[tflite]"


def without_tflite(*lines):
    """`(code, stdout, stderr)` of command lines where the extra is not installed."""
    job = ROOT / "tests" / "without_tflite_job.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(job), json.dumps([[str(word) for word in line] for line in lines])],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def error_of(outcome):
    code, out, err = outcome
    assert (code, out) == (2, "")
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    return error


def test_what_touches_no_tflite_works(made, recipe, tmp_path):
    plain = recipe("plain", train={"epochs": 1}, export={"weights": []})
    lines = {
        ("zoo", "list", "resnet8*"): "resnet8_cifar10_w4a4",
        ("inspect", made / "w4a4.keras"): "mix",
        ("check", made / "w4a4.keras"): "no objections",
        ("evaluate", made / "w4a4.keras", "--data=digits", "--images=8"): "quantized",
        ("train", plain, "--out", tmp_path / "plain"): "Results: ",
    }
    for (code, out, err), said in zip(without_tflite(*lines), lines.values(), strict=True):
        assert (code, said in out) == (0, True), err
    assert (tmp_path / "plain" / "metrics.json").is_file()


def test_what_needs_the_extra_says_so_before_it_works(made, recipe, tmp_path):
    trained, *files, converted = without_tflite(
        ("train", recipe(train={"epochs": 1}), "--out", tmp_path / "out"),
        ("export", made / "w4a4.keras", "--out", tmp_path / "m.tflite"),
        ("evaluate", made / "w4a4.tflite", "--data=digits"),
        ("inspect", made / "w4a4.tflite"),
        ("convert", made / "w4a4.keras"),
    )
    error = error_of(trained)
    assert error.startswith("error: tiny: [export] weights = [] trains and measures the model with")
    assert error.endswith(NEEDS)
    for outcome in files:
        assert error_of(outcome).endswith(NEEDS)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    code, checked, error = converted
    assert (code, checked, error.strip().endswith(NEEDS)) == (2, "[]\n", True)
