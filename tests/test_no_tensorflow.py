"""JAX and PyTorch users need no TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.runtime
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="the backend is TensorFlow")
def test_everything_up_to_the_verified_file_works_without_tensorflow(tmp_path):
    job = ROOT / "tests" / "no_tensorflow_job.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(job), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wrong 0 of " in done.stdout
