import dataclasses

import pytest

from keras_lowbit.training import Stage, StagePlan
from keras_lowbit.training.plan import visits

pytestmark = pytest.mark.once

GOOD = {"name": "w4a4", "kernel_bits": 4, "activation_bits": 4, "epochs": 1, "learning_rate": 0.1}


def stage(name, kernel, activation, epochs=1):
    return Stage(name, kernel, activation, epochs, 0.1)


def test_none_and_32_are_float():
    assert Stage("f", None, 32, 1, 0.1).bits == (32, 32)
    assert Stage("f", None, 32, 1, 0.1) == Stage("f", 32, None, 1, 0.1)


def test_a_descent_names_its_stages():
    plan = StagePlan.descent((4, 2), epochs=(1, 3), learning_rate=0.1)
    assert [(s.name, s.bits, s.epochs) for s in plan.stages] == [
        ("w4a4", (4, 4), 1),
        ("w2a2", (2, 2), 3),
    ]
    assert plan.epochs == 4
    assert [s.bits[0] for s in StagePlan.descent(epochs=1, learning_rate=1).stages] == [4, 3, 2, 1]


def test_two_stages_with_float_activations_first_are_a_plan():
    plan = StagePlan([stage("weights", 2, None), stage("both", 2, 2)])
    assert isinstance(plan.stages, tuple)


def test_visits_are_the_plan_and_the_return_between_cycles():
    plan = StagePlan((stage("a", 4, 4, 2), stage("b", 2, 2, 3)))
    found = visits(plan, 2, stage("float", None, None, 5))
    assert [(v.index, v.cycle, v.stage.name, v.first_epoch, v.ends_cycle) for v in found] == [
        (0, 1, "a", 0, False),
        (1, 1, "b", 2, True),
        (2, 2, "float", 5, False),
        (3, 2, "a", 10, False),
        (4, 2, "b", 12, True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "w4a4: epochs must be a whole number of at least 1. Got 0"),
        ({"epochs": True}, "epochs"),
        ({"kernel_bits": 9}, "kernel_bits must be 1 to 8, or 32 or None for float. Got 9"),
        ({"activation_bits": 0}, "activation_bits must be 1 to 8"),
        ({"learning_rate": 0}, "learning_rate must be .* Got 0"),
        (
            {"learning_rate": float("nan")},
            "learning_rate must be .* above 0 and below",
        ),
        ({"name": "a/b"}, "name must be of letters"),
        ({"frozen": "conv1"}, "frozen is a tuple of patterns. Got 'conv1'"),
    ],
)
def test_bad_stages_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one Stage"),
        ((stage("a", 2, 4), stage("b", 3, 4)), "kernels rise from 2 bits in a to 3 in b"),
        ((stage("a", 4, 4), stage("b", 2, None)), "activations rise from 4 bits in a to 32 in b"),
        ((stage("a", 4, 4), stage("a", 2, 2)), "a name of its own"),
        ((4, 2), "expected a Stage. Got 4"),
    ],
)
def test_bad_plans_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        StagePlan(stages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": (4, 4), "epochs": 1}, "bits must fall strictly"),
        ({"bits": (2, 3), "epochs": 1}, "bits must fall strictly"),
        ({"bits": (4, 3), "epochs": (1, 2, 3)}, "epochs is one number or 2"),
    ],
)
def test_bad_descents_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StagePlan.descent(**arguments, learning_rate=0.1)


def test_a_stage_is_data():
    assert dataclasses.asdict(Stage(**GOOD)) == {**GOOD, "frozen": ()}
