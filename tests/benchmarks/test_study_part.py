"""Statistics of the study, worked by hand."""

import math

import pytest

from keras_lowbit.cli.recipe import read_recipe
from tests.benchmarks.study_part import RECIPES, deployed_epochs, mean_and_error, rows, verdict

pytestmark = pytest.mark.once


def test_the_standard_error_is_that_of_the_seeds_or_of_the_images():
    # 0.80, 0.82, 0.84: standard deviation 0.02, over sqrt(3)
    mean, error = mean_and_error([0.80, 0.82, 0.84], 10_000)
    assert mean == pytest.approx(0.82)
    assert error == pytest.approx(0.02 / math.sqrt(3))
    # Equal seeds: sqrt(0.8 * 0.2 / 10000) = 0.004, over sqrt(4)
    assert mean_and_error([0.8] * 4, 10_000)[1] == pytest.approx(0.002)
    assert mean_and_error([0.8], 10_000) == pytest.approx((0.8, 0.004))


def test_differences_under_two_standard_errors_are_not_distinguishable():
    assert verdict(0.019, 0.01) == "not distinguishable (+1.90)"
    assert verdict(-0.021, 0.01) == "-2.10"


def test_an_arm_is_compared_with_the_plain_one_of_its_scheme():
    def run(arm, accuracy):
        return {"arm": arm, "accuracy": accuracy, "images": 10_000, "epochs": 8}

    found = {
        "w2a2_descent": [run("w2a2_descent", 0.9)],
        "w2a2_one_shot": [run("w2a2_one_shot", 0.8)],
        "wta8_both": [run("wta8_both", 0.85)],
    }
    plain, descent, alone = rows(found)
    assert (plain[0], plain[-1]) == ("w2a2_one_shot", "")
    assert (descent[0], descent[3], descent[-1]) == ("w2a2_descent", "90.00", "+10.00")
    assert (alone[0], alone[-1]) == ("wta8_both", "")


@pytest.mark.parametrize(
    ("arm", "epochs"),
    [
        ("w2a2_one_shot", 8),
        ("w2a2_descent", 4),  # 4 bits from epoch 0, 3 from 2, 2 from 4
        ("w2a2_cycles", 2),  # two cycles of three epochs, the last of each at 2 bits
        ("w2a2_weights_first", 5),
        ("w2a2_stochastic", 3.2),
        ("wta8_pull", 5),
    ],
)
def test_epochs_at_the_last_bits_are_counted_from_the_recipe(arm, epochs):
    assert deployed_epochs(read_recipe(RECIPES / f"{arm}.toml")) == pytest.approx(epochs)
