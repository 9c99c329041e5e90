"""The pages made from docstrings are what the script makes of them now."""

import inspect
from pathlib import Path

import pytest

import keras_lowbit as klb
from keras_lowbit.cli.recipe import Recipe
from tests.benchmarks import write_reference
from tests.benchmarks.write_reference import first_sentence, said_of_arguments

pytestmark = pytest.mark.once

GOOGLE = """Join two lists.

    Args:
        first: numbers; `None` for
            none. They stay as they are.
        **others: more of them.

    Returns:
        A list: the longer one.
"""


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_the_page_is_what_the_docstrings_say(name):
    written = (write_reference.DOCS / name).read_text()
    assert written == write_reference.PAGES[name](), "run make reference"


def test_every_public_name_has_a_row():
    text = write_reference.reference()
    missing = [
        f"{module}.{name}"
        for module, found in write_reference.MODULES.items()
        for name in found.__all__
        if f"\n| `{name}` |" not in text and not hasattr(klb, name)
    ]
    assert not missing


def test_every_section_and_key_of_a_recipe_has_a_meaning():
    text = write_reference.recipes()
    assert all(f"\n## {section}\n" in text for section in set(vars(Recipe("x"))) - {"name"})
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.split(" | ")[3].rstrip("| ") for line in rows)


def test_a_sentence_ends_at_its_full_stop_and_not_in_a_name():
    assert first_sentence("From `a.b` to 0.5, on\n  two lines. More.\n\nNext.") == (
        "From `a.b` to 0.5, on two lines"
    )


def test_arguments_are_read_from_a_google_docstring():
    found = said_of_arguments(inspect.cleandoc(GOOGLE))
    assert found == {"first": "numbers; `None` for none", "**others": "more of them"}


def test_a_key_of_which_nothing_is_said_is_refused(monkeypatch):
    train = type(Recipe("x").train)
    monkeypatch.setattr(train, "__doc__", train.__doc__.replace("momentum: of SGD", "of SGD"))
    with pytest.raises(ValueError, match=r"\[train\] momentum: its meaning is said nowhere"):
        write_reference.key_rows("train", train)


def test_the_scripts_write_where_the_readme_links(monkeypatch, tmp_path):
    monkeypatch.setattr(write_reference, "DOCS", tmp_path)
    write_reference.main()
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == sorted(write_reference.PAGES)
