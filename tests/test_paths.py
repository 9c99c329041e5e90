from pathlib import Path

import pytest

from keras_lowbit.paths import expanded

pytestmark = pytest.mark.once


def test_a_tilde_is_the_home_folder_and_other_paths_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~") == tmp_path
    assert expanded("~/runs/x") == expanded(Path("~/runs/x")) == tmp_path / "runs" / "x"
    assert expanded("a/~/b") == Path("a/~/b")
    assert expanded("/a/b") == Path("/a/b")


def test_a_file_whose_name_begins_with_a_tilde_is_reached_by_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("~mine.keras").touch()
    assert expanded("./~mine.keras").is_file()
    assert expanded(expanded("./~mine.keras")).is_file()
    assert expanded(tmp_path / "~mine.keras").is_file()


def test_an_unknown_home_is_an_error_that_names_the_path():
    with pytest.raises(ValueError, match=r"~nosuch/x: no home folder is known for ~nosuch\. Give"):
        expanded("~nosuch/x")
    with pytest.raises(ValueError, match=r"for ~nosuch\. Take cache=$"):
        expanded("~nosuch", advice="Take cache=")


def test_a_user_without_a_home_is_an_error_that_names_the_path(homeless):
    with pytest.raises(ValueError, match=r"~/x: no home folder is known for ~\. Give"):
        expanded("~/x")
