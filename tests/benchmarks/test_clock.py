"""How the benchmarks time, with a clock that the test winds."""

import pytest

from tests.benchmarks import clock, import_time

pytestmark = pytest.mark.once


@pytest.fixture
def now(monkeypatch):
    """Seconds of a clock that only steps move."""
    hand = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hand[0])
    return hand


def stepping(now, log, name, seconds):
    """A step that takes the next of `seconds`."""
    taken = iter(seconds)

    def step():
        log.append(name)
        now[0] += next(taken)

    return step


def test_steps_alternate_and_the_median_leaves_out_the_warm_ones(now):
    log = []
    steps = {
        ("float", "plain"): stepping(now, log, "f", (90.0, 80.0, 1.0, 9.0, 2.0)),
        ("w4a4", "plain"): stepping(now, log, "q", (70.0, 60.0, 5.0, 3.0, 4.0)),
    }
    found = clock.alternate(steps, rounds=3)
    assert "".join(log) == "fq" * 5
    assert found == {("float", "plain"): 2.0, ("w4a4", "plain"): 4.0}


def test_no_round_is_refused():
    with pytest.raises(ValueError, match=r"rounds must be at least 1\. Got 0"):
        clock.alternate({}, rounds=0)


def test_each_kind_counts_in_its_fastest_form():
    times = {("float", "plain"): 3.0, ("float", "jit"): 2.0, ("w4a4", "plain"): 4.0}
    assert clock.fastest(times) == {"float": 2.0, "w4a4": 4.0}


def test_the_processor_has_a_name():
    assert clock.processor()


class TestImportTime:
    def test_the_first_round_does_not_count_and_what_is_added_is_a_median(self):
        # (import keras, what follows it), rounds 0 to 7, of each kind of process.
        alone = iter([(50.0, 0.0)] + [(float(i), 0.0) for i in range(1, 8)])
        both = iter([(50.0, 50.0)] + [(float(i), 0.125 * i) for i in range(1, 8)])
        found = import_time.measure(7, lambda name: next(alone if name == "keras" else both))
        # Medians: 4; 0.5; and 4 + 0.5 less 4.
        assert (found["keras_s"], found["added_s"], found["difference_s"]) == (4.0, 0.5, 0.5)

    def test_few_rounds_are_refused(self):
        with pytest.raises(ValueError, match=r"at least 7\. Got 3"):
            import_time.measure(3)
