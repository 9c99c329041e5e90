"""Memory that a training step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt (malloc.h), and what a long training wants of them.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: one heap, whose top can be kept; others are unmapped as they empty
    -4: 0,  # M_MMAP_MAX: no mapping of its own for each large tensor
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: do not give the top of the heap back
    -2: 2**26,  # M_TOP_PAD: ask for 64 MiB at a time
}


def keep_memory() -> bool:
    """Tell glibc's allocator not to give memory back to the system between steps.

    By default every step maps and unmaps its activations, and the kernel fills the pages with
    zeros again; on a CPU that can take a good part of a training's time. Environment variables
    `MALLOC_...` of the user's go first: with any of them set nothing is changed.

    Returns:
        Whether the allocator took the settings; False where it is not glibc's.
    """
    if not sys.platform.startswith("linux") or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
