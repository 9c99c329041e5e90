"""Files that are whole at any moment, and one error for those that are not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# What readers let through when a file is cut off, overwritten or of another kind.
DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
AFRESH = "Start afresh with an empty directory"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well.

    It has the suffix of `path` and a name that no other process or thread has; what a killed writer
    left behind is written over by one of the same numbers, or stays.

    Raises:
        OSError: the disk is full or refuses; names the file. An older file is untouched.
    """
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    temporary = path.with_name(f".{path.stem}.{writer}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        number = error.errno or errno.EIO
        reason = f"{os.strerror(number)}; nothing was written and an older file is untouched"
        raise OSError(number, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An `.npz` file."""
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` of ours, in the order of their names.

    Raises:
        ValueError: a damaged file.
    """
    try:
        # NumPy takes what is no archive for a pickle, and says so.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("cut short or no .npz file")
        with np.load(path) as stored:
            return {name: stored[name] for name in sorted(stored.files)}
    except DAMAGE as error:
        raise damaged(path, error) from error


def write_json(content, path: Path) -> None:
    """A JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, default):
    """The content, or `default` where there is no file.

    Raises:
        ValueError: a damaged file, or one of something else than `default` where that is no `None`.
    """
    if not path.is_file():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if default is not None and type(found) is not type(default):
            raise ValueError(f"no {type(default).__name__}")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return found


def damaged(path: Path, error: BaseException) -> ValueError:
    """What to raise for a file of a training that cannot be read."""
    return ValueError(f"{path} is damaged ({first_line(error)}). {AFRESH}")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def checksum(arrays) -> int:
    """CRC-32 of arrays, one after the other."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total
