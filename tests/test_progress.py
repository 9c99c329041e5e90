import io
import sys

import pytest

from keras_lowbit import progress

pytestmark = pytest.mark.once


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand, in seconds."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_track_yields_every_item_in_order():
    assert list(progress.track(range(5), "counting")) == [0, 1, 2, 3, 4]


def test_short_work_is_silent_outside_a_terminal(clock, capsys):
    for _ in progress.track(range(3), "quick"):
        clock.now += 0.3
    assert capsys.readouterr() == ("", "")


def test_long_work_leaves_one_line_outside_a_terminal(clock, capsys):
    for _ in progress.track(range(4), "calibrating"):
        clock.now += 0.5
    assert capsys.readouterr() == ("", "calibrating: 4/4 in 2.0 s\n")


def test_work_that_stops_early_says_how_far_it_came(clock, capsys):
    def work():
        for item in progress.track(iter(range(9)), "calibrating", total=9):
            clock.now += 1.0
            if item == 3:
                raise KeyError

    with pytest.raises(KeyError):
        work()
    assert capsys.readouterr().err == "calibrating: 3/9 in 4.0 s\n"


def test_a_total_that_is_not_known_is_left_out(clock, capsys):
    for _ in progress.track(iter("ab"), "reading"):
        clock.now += 1.0
    assert capsys.readouterr().err == "reading: 2 in 2.0 s\n"


def test_a_terminal_gets_a_bar_with_count_and_eta(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert list(progress.track(range(3), "reading [x]")) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "reading [x]" in shown
    assert "3/3" in shown
    assert "ETA" in shown


def test_without_stderr_work_is_done_in_silence(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    done = []
    for item in progress.track(range(4), "calibrating"):
        clock.now += 1.0
        done.append(item)
    assert done == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("stdout", "verbose"), [(Terminal(), 1), (io.StringIO(), 2), (None, 0)])
def test_fit_shows_a_bar_or_lines_or_nothing(monkeypatch, stdout, verbose):
    monkeypatch.setattr(sys, "stdout", stdout)
    assert progress.fit_verbosity() == verbose


def test_a_table_needs_no_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert progress.table("", ["a"], [["x"]]).splitlines()[-1] == "| x |"


def test_table_aligns_figures_right_and_words_left():
    text = progress.table("sizes", ["layer", "bytes"], [["conv", 9], ["dense", 1024], ["x", None]])
    assert text.splitlines() == [
        "sizes",
        "",
        "| layer | bytes |",
        "|-------|-------|",
        "| conv  |     9 |",
        "| dense |  1024 |",
        "| x     |     - |",
    ]


def test_table_cuts_nothing_and_reads_no_markup():
    cell = "[bold]" + "w" * 300
    assert cell in progress.table("", ["a"], [[cell]])


def test_table_without_rows_shows_its_headings():
    assert progress.table("", ["a", "b"], []).splitlines()[0] == "| a | b |"


def test_table_names_a_row_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"2 columns need 2 cells a row\. Got 1: \['x'\]"):
        progress.table("t", ["a", "b"], [["x"]])


def test_importing_progress_does_not_import_rich():
    import subprocess

    code = (
        "import sys, importlib.util as u;"
        f"s = u.spec_from_file_location('p', {progress.__file__!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print('rich' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
