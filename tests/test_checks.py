import math
import re

import numpy as np
import pytest

from keras_lowbit.callbacks import BitDescent, ChannelBalanceDecay, CyclicPrecision
from keras_lowbit.checks import checked_choice, checked_count, checked_number
from keras_lowbit.training import Stage

pytestmark = pytest.mark.once


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_come_back_as_ints(value):
    found = checked_count(value, who="x", least=3)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value", [2, np.int32(2), True, np.bool_(True), 3.0, np.float32(3), "3", None, [3], np.array(3)]
)
def test_all_else_is_refused_by_name(value):
    said = f"ScaleGuard: every must be a whole number of at least 3. Got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        checked_count(value, who="ScaleGuard: every", least=3)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int8(1)])
def test_numbers_come_back_as_floats(value):
    found = checked_number(value, who="x", least=0, most=1)
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("value", [0, -1, 1, np.float32(2), math.nan, True, "0.5", None, [0.5]])
def test_numbers_out_of_range_are_refused_by_name(value):
    said = f"MinMax: momentum must be a finite number, above 0 and below 1. Got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        checked_number(value, who="MinMax: momentum", above=0, below=1)


def test_without_limits_any_finite_number_will_do():
    assert checked_number(-3, who="x") == -3.0
    for value in (math.inf, -math.inf, math.nan, 10**400, 1j, np.complex64(1)):
        with pytest.raises(ValueError, match=r"^x must be a finite number\. Got "):
            checked_number(value, who="x")


def test_the_error_ends_with_the_advice():
    with pytest.raises(ValueError, match=r"Got 0\. Leave it out$"):
        checked_count(0, who="x", least=1, advice="Leave it out")


def test_numbers_of_numpy_are_kept_as_ints_by_who_took_them():
    three = np.int64(3)
    cyclic = CyclicPrecision(np.int64(2), three, np.int64(1), three)
    kept = [
        ChannelBalanceDecay(three).epochs,
        Stage("a", 4, 4, three, 0.1).epochs,
        *(n for pair in BitDescent({three: three}).plan.items() for n in pair),
        *(cyclic.low, cyclic.high, cyclic.cycles, cyclic.epochs),
    ]
    assert {type(n) for n in kept} == {int}


def test_a_choice_is_given_back_or_refused_with_the_nearest():
    assert checked_choice("b", ("a", "b"), who="K: k") == "b"
    assert checked_choice(None, ("float32", None), who="K: k") is None
    with pytest.raises(ValueError, match=r"^K: k must be one of \('ramp', None\). Got 'ram'. Did"):
        checked_choice("ram", ("ramp", None), who="K: k")
    with pytest.raises(ValueError, match=r"Got 3\.$"):
        checked_choice(3, ("ramp", None), who="K: k")
