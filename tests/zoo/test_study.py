"""Which arms the study runs, and in which order."""

import pytest

from tests.zoo.scripts import ZOO, script

pytestmark = pytest.mark.once


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ZOO))  # as when the script runs
    return script("study")


def test_what_others_are_compared_with_runs_first(study):
    names = [path.stem for path in study.arms("*")]
    schemes = [name.split("_")[0] for name in names]
    assert list(dict.fromkeys(schemes)) == list(study.SEEDS)
    first = {scheme: names[schemes.index(scheme)] for scheme in study.SEEDS}
    assert first == {"w2a2": "w2a2_one_shot", "wta8": "wta8_plain", "w1a1": "w1a1_one_shot"}
    assert len(names) == 18


def test_a_pattern_chooses(study):
    assert [path.stem for path in study.arms("w1a1_c*")] == ["w1a1_cycles"]
    assert study.arms("w9*") == []
