"""Write `docs/reference.md` and `docs/recipes.md` from docstrings (`make reference`).

    PYTHONPATH=. python tests/benchmarks/write_reference.py

The first has a table for each public module, the second one for each section of a recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import keras_lowbit as klb
import tflite_export
from keras_lowbit.cli.recipe import Recipe
from keras_lowbit.progress import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
MODULES = {
    "keras_lowbit": klb,
    "keras_lowbit.callbacks": klb.callbacks,
    "keras_lowbit.distillation": klb.distillation,
    "keras_lowbit.training": klb.training,
    "keras_lowbit.tuning": klb.tuning,
    "keras_lowbit.regularizers": klb.regularizers,
    "keras_lowbit.optimizers": klb.optimizers,
    "keras_lowbit.quantizers": klb.quantizers,
    "keras_lowbit.layers": klb.layers,
    "keras_lowbit.analysis": klb.analysis,
    "keras_lowbit.data": klb.data,
    "keras_lowbit.zoo": klb.zoo,
    "tflite_export": tflite_export,
}
TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    tuple: "list",
    dict: "table",
}


# --- docstrings -----------------------------------------------------------------------------------


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line and without its full stop."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", paragraph, maxsplit=1)[0]


def said_of_arguments(docstring: str) -> dict[str, str]:
    """Argument to the first sentence about it, from the `Args` of a Google-style docstring."""
    block = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", f"{docstring}\n", re.MULTILINE)
    if not block:
        return {}
    indent = len(block[1]) - len(block[1].lstrip(" "))
    entries = re.split(rf"^ {{{indent}}}(?=\S)", block[1], flags=re.MULTILINE)[1:]
    parts = (entry.partition(":") for entry in entries)
    return {name.strip(): first_sentence(text) for name, _, text in parts}


def meaning(thing) -> str:
    """What a public object is, in a sentence; of a collection the names in it."""
    if not callable(thing):
        return ", ".join(f"`{name}`" for name in thing)
    return first_sentence(inspect.getdoc(thing))


# --- reference ------------------------------------------------------------------------------------


def reference() -> str:
    """The text of `docs/reference.md`."""
    parts = [
        "# Reference\n",
        "Written by `make reference` from the docstrings, which say more: `help(klb.calibrate)`.",
        "Arguments written `name=` are given by name only. Arguments that a class hands on to",
        "Keras are left out, and so are functions that stand under `keras_lowbit` already.\n",
        *(f"* [{name}](#{name.replace('.', '')}): {_heading(m)}" for name, m in MODULES.items()),
        "",
    ]
    for name, module in MODULES.items():
        rows = [row for public in module.__all__ for row in _rows(module, public)]
        parts += [f"## {name}\n", f"{_heading(module)}.\n"]
        parts += [_table(("name", "argument", "default", "meaning"), rows), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _heading(module):
    return first_sentence(module.__doc__)


def _rows(module, name):
    """Rows of a public name: itself, its arguments, and what a result of its kind holds."""
    thing = getattr(module, name)
    if inspect.ismodule(thing) or (module is not klb and getattr(klb, name, None) is thing):
        return
    yield _cells(f"`{name}`", "", "", meaning(thing))
    if not callable(thing):
        return
    said = said_of_arguments(inspect.getdoc(thing))
    for parameter in _parameters(thing):
        given = _given(parameter)
        text = said.get(given.rstrip("="), "")
        if text or inspect.isfunction(thing):
            yield _cells("", f"`{given}`", _default(thing, parameter), text)
    if dataclasses.is_dataclass(thing):
        for member, value in vars(thing).items():
            called = inspect.isfunction(value)
            known = called or isinstance(value, (property, functools.cached_property))
            if known and not member.startswith("_") and inspect.getdoc(value):
                arguments = ", ".join(map(_given, [*_parameters(value)][1:])) if called else ""
                shown = f"`.{member}({arguments})`" if called else f"`.{member}`"
                yield _cells(shown, "", "", first_sentence(inspect.getdoc(value)))


def _parameters(thing):
    try:
        return inspect.signature(thing).parameters.values()
    except ValueError:  # an exception's
        return ()


def _given(parameter) -> str:
    before = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    behind = "=" if parameter.kind is parameter.KEYWORD_ONLY else ""
    return f"{before}{parameter.name}{behind}"


def _default(thing, parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    default = parameter.default
    if dataclasses.is_dataclass(thing):
        (found,) = (f for f in dataclasses.fields(thing) if f.name == parameter.name)
        if found.default_factory is not dataclasses.MISSING:
            default = found.default_factory()
    return f"`{default!r}`"


def _cells(*texts):
    return tuple(text.replace("|", "\\|") for text in texts)


def _table(columns, rows) -> str:
    """A Markdown table without the blanks that make a column as wide as its longest cell."""
    lines = table("", columns, rows).strip().splitlines()
    return "\n".join(re.sub(r" {2,}", " ", re.sub(r"-{3,}", "---", line)) for line in lines)


# --- recipes --------------------------------------------------------------------------------------


def recipes() -> str:
    """The text of `docs/recipes.md`."""
    parts = [
        "# Recipes\n",
        "Written by `make reference`. A recipe is a TOML file for `keras-lowbit train`. These are",
        "its sections and keys; all may be left out, any other is refused. `configs/` has",
        "examples.\n",
    ]
    written = {}
    for section in dataclasses.fields(Recipe):
        if section.name == "name":  # of the file
            continue
        cls = type(getattr(Recipe("any"), section.name))
        parts += [f"## {section.name}\n"]
        if cls in written:
            parts += [f"The keys of [{written[cls]}](#{written[cls]}), for the quantized model.\n"]
            continue
        written[cls] = section.name
        parts += [f"{first_sentence(cls.__doc__)}.\n"]
        parts += [_table(("key", "type", "default", "meaning"), key_rows(section.name, cls)), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def key_rows(section: str, cls) -> list[tuple[str, ...]]:
    """Rows of a section: key, type, default, meaning.

    Raises:
        ValueError: a key of which nothing is said anywhere.
    """
    said, defaults, rows = said_of_arguments(inspect.getdoc(cls)), cls(), []
    for key in (field.name for field in dataclasses.fields(cls)):
        if key not in said:
            raise ValueError(f"[{section}] {key}: its meaning is said nowhere. Say it in {cls}")
        value = getattr(defaults, key)
        kind = TYPES[type(value)]
        rows.append(_cells(f"`{key}`", kind, f"`{_toml(value)}`", said[key]))
    return rows


def _toml(value) -> str:
    """A value as a recipe writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


PAGES = {"reference.md": reference, "recipes.md": recipes}


def main():
    for name, text in PAGES.items():
        (DOCS / name).write_text(text())


if __name__ == "__main__":
    main()
