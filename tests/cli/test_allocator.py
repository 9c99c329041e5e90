"""The allocator's settings of a long training."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

# Run as a file: importing the package would import Keras.
ALLOCATOR = Path(__file__).resolve().parents[2] / "keras_lowbit" / "cli" / "allocator.py"

# Blocks of 8 MB, freed and taken again: kept memory is not faulted in a second time.
JOB = """
import ctypes, resource, runpy, sys
if sys.argv[1] == "keep":
    print(runpy.run_path(sys.argv[2])["keep_memory"]())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(8 << 20) for _ in range(6)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode, **environment):
    """What the job prints, in a fresh process."""
    command = [sys.executable, "-c", JOB, mode, str(ALLOCATOR)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    taken, kept = faults("keep")
    if taken == "False":
        pytest.skip("the C library is not glibc")
    (given_back,) = faults("default")
    assert int(kept) < int(given_back) / 10


def test_the_users_own_settings_go_first():
    taken, _ = faults("keep", MALLOC_ARENA_MAX="2")
    assert taken == "False"
