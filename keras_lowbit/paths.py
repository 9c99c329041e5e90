"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path, advice: str = "Give the whole path") -> Path:
    """A path whose leading `~` or `~name` is the home folder; `./~name` is a file of that name.

    Args:
        path: of a file or folder, there or not.
        advice: a sentence without its full stop; the error ends with it.

    Raises:
        ValueError: nobody has such a home folder; names the path.
    """
    # As text: `Path` drops the "./" of a name that begins with a tilde.
    found = os.path.expanduser(os.fspath(path))
    if found.startswith("~"):
        name = Path(found).parts[0]
        raise ValueError(f"{path}: no home folder is known for {name}. {advice}")
    made = Path(found)
    # Absolute, where it would be taken for a home folder once more.
    return Path.cwd() / made if str(made).startswith("~") else made
