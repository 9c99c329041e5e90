"""Training on several devices through `keras.distribution`, which is JAX's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.callbacks import parallel_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is JAX's")
def test_training_on_eight_devices_follows_that_on_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.parallel_job"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, eight = json.loads(done.stdout.splitlines()[-1])
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert len(one["rows"]) == len(eight["rows"]) == parallel_job.EPOCHS
    assert [row["middle.kernel_quantizer"] for row in one["rows"]] == [8, 6, 6, 4]
    for a, b in zip(one["rows"], eight["rows"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Eight partial sums are added in another order: some units in the last place of a
            # float32. An activation that gets another code moves the loss a thousand times more.
            np.testing.assert_allclose(b[name], a[name], rtol=2.0**-20, err_msg=name)
