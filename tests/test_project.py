"""What pyproject.toml says of the files that are given away."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[1]


def test_the_sdist_holds_what_contributing_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    words = re.findall(r"[\w./-]+", (ROOT / "CONTRIBUTING.md").read_text())
    tops = {word.split("/")[0] for word in words if (ROOT / word).exists()}
    tops -= {"", ".", "..", ".venv", "pyproject.toml"}  # made by `make`; always there
    assert {".ci", "docs", "tests", "Makefile"} <= tops | {"Makefile"}
    assert not [top for top in tops if not any(fnmatch.fnmatch(top, p) for p in include)]
