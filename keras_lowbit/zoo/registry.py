"""Which models are released: the index that ships with the package."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RELEASED = Path(__file__).parent / "released"
INDEX = RELEASED / "index.json"
FORMAT = 1
# The scheme of models whose kernels are reals: where low-bit ones of the same data start.
FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known about a released model.

    Attributes:
        name: what `load` takes.
        architecture: name of `zoo.build`.
        data: training data.
        scheme: bits, such as `"w4a4"`, or `"float"`.
        input_shape: height, width, channels; pixels 0..255.
        classes: outputs.
        bytes: size of the checkpoint, packed unless float.
        sha256: of the checkpoint, in hexadecimal.
        accuracy: shares of right answers, by `"float"`, `"quantized"` and kind of file.
        interval: 95 % interval of the first exported file's accuracy, or of the float model's.
        file_bytes: sizes of the exported files by kind; none of a float model.
        origin: starting weights and their licence.
    """

    name: str
    architecture: str
    data: str
    scheme: str
    input_shape: tuple[int, ...]
    classes: int
    bytes: int
    sha256: str
    accuracy: Mapping[str, float]
    interval: tuple[float, float]
    file_bytes: Mapping[str, int]
    origin: str

    def __str__(self):
        reached = ", ".join(f"{kind} {share:.2%}" for kind, share in self.accuracy.items())
        form = "as it is" if self.scheme == FLOAT else "packed"
        files = ", ".join(f"{kind} {size:,}" for kind, size in self.file_bytes.items())
        sizes = f"{form} {self.bytes:,}" + (files and f"; {files}")
        shape = "x".join(map(str, self.input_shape))
        return (
            f"{self.name}: {self.architecture} on {self.data}, {self.scheme}, {shape}, "
            f"{self.classes} classes\naccuracy: {reached}\nbytes: {sizes}\n"
            f"origin: {self.origin}"
        )


def list_models(pattern: str = "*") -> list[str]:
    """Names of released models that match a shell pattern, sorted.

    Args:
        pattern: with `*` and `?` as in a shell, such as `"resnet8*"`.

    Raises:
        ValueError: a pattern that is no text.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"zoo.list: a pattern is text such as 'resnet8*'. Got {pattern!r}")
    return sorted(name for name in entries() if fnmatch.fnmatchcase(name, pattern))


def info(name: str) -> Entry:
    """What is known about a released model.

    Raises:
        ValueError: no such model; the nearest names are listed.
    """
    known = entries()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"No released model {name!r}.{hint} zoo.list() names all {len(known)}")
    return known[name]


def entries(index: Path | None = None) -> dict[str, Entry]:
    """All entries of an index file by name; none where there is no file.

    Raises:
        ValueError: the index was written by a newer version.
    """
    index = INDEX if index is None else index
    if not index.is_file():
        return {}
    found = json.loads(index.read_text())
    if found["format"] > FORMAT:
        raise ValueError(
            f"{index} has format {found['format']}; this version reads up to {FORMAT}. "
            "Upgrade keras-lowbit"
        )
    return {name: _entry(name, fields) for name, fields in found["models"].items()}


def as_json(known: Mapping[str, Entry]) -> str:
    """The text of an index file."""
    models = {}
    for name in sorted(known):
        fields = dataclasses.asdict(known[name])
        del fields["name"]
        models[name] = fields
    return json.dumps({"format": FORMAT, "models": models}, indent=1) + "\n"


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    for key in ("input_shape", "interval"):
        fields[key] = tuple(fields[key])
    return Entry(name=name, **fields)
