"""What a recipe asks of its data and its model is seen before anything is trained."""

import keras
import numpy as np
import pytest

from keras_lowbit import data
from keras_lowbit.cli import files, preflight
from keras_lowbit.cli.recipe import read_recipe

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def ending_in(made, layer):
    """The small net with one more layer."""
    model = files.load_model(made / "float.keras")
    return keras.Model(model.input, layer(model.output), name="changed")


STEPS = {"steps": 2, "batch_size": 8}


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (
            {"reconstruct": {**STEPS, "block_steps": {"nope*": 3}}},
            "[reconstruct]: reconstruct: block_steps has 'nope*', which matches no block. Bl",
        ),
        (
            {"reconstruct": {**STEPS, "block_rates": {"nope*": {"biases": 0.1}}}},
            "[reconstruct]: reconstruct: block_rates has 'nope*', which matches no block. Bl",
        ),
        (
            {"reconstruct": {**STEPS, "logit_blocks": 40}},
            "[reconstruct]: reconstruct: logit_blocks must be at most 1, the blocks of tiny. Got ",
        ),
        (
            {"reconstruct": STEPS, "quantize": {"scheme": "w1a4", "ends_bits": 0}},
            "tiny [reconstruct]: conv: kernels of 1 bit have no scale of their own to tune",
        ),
        (
            {"reconstruct": STEPS, "quantize": {"kernel": "dorefa"}},
            "tiny [reconstruct]: mix: DoReFa keeps no scale variable",
        ),
        (
            {"reconstruct": STEPS, "quantize": {"activation": "pact"}},
            "tiny [reconstruct]: relu_quantize: PACT keeps no scale variable",
        ),
        (
            {"reconstruct": STEPS, "quantize": {"kernel": "levels"}, "model": {"fold": True}},
            "tiny [reconstruct]: mix: Levels keeps no scale variable",
        ),
        ({"refine": STEPS, "quantize": {"activation": "pact"}}, "tiny [refine]: relu"),
    ],
)
def test_what_block_reconstruction_would_refuse_is_told_first(made, recipe, digits, sections, why):
    model = files.load_model(made / "float.keras")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        preflight.check(read_recipe(recipe(**sections)), digits, model)
    assert why in str(caught.value)


def test_what_block_reconstruction_takes_passes(made, recipe, digits):
    tuned = {**STEPS, "block_steps": {"*": 3}, "logit_blocks": 1, "logit_weight": 0.5}
    path = recipe(model={"fold": True}, reconstruct=tuned, refine=STEPS)
    model = files.load_model(made / "float.keras")
    before = [np.array(w) for w in model.get_weights()]
    preflight.check(read_recipe(path), digits, model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_logits_are_weighed_where_there_are_some(made, recipe, digits, monkeypatch):
    model = files.load_model(made / "float.keras")
    model = keras.Model(model.input, model.get_layer("relu2").output, name="headless")
    path = recipe(reconstruct={**STEPS, "logit_weight": 0.5})
    monkeypatch.setattr(preflight.measure, "output_classes", lambda *_: 10)
    with pytest.raises(
        ValueError, match=r"\[reconstruct\]: reconstruct: logit_weight needs a model wit"
    ):
        preflight.check(read_recipe(path), digits, model)


@pytest.mark.parametrize("scheme", ["", "w4a4"])
def test_a_net_that_ends_in_softmax_is_not_distilled_into(made, recipe, digits, scheme):
    train = {"epochs": 1, "distill": 0.5, "teacher": "another"}
    path = recipe(quantize={"scheme": scheme}, train=train)
    soft = ending_in(made, keras.layers.Softmax(name="probabilities"))
    with pytest.raises(ValueError, match=r"tiny \[train\]: distill needs a model that ends in log"):
        preflight.check(read_recipe(path), digits, soft)
    preflight.check(read_recipe(recipe(quantize={"scheme": scheme})), digits, soft)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda x: keras.layers.Dense(1)(x), "has 1 output"),
        (lambda x: [x, keras.layers.Dense(10)(x)], r"gives \(None, 10\) and \(None, 10\); accu"),
        (lambda x: keras.layers.Reshape((1, 1, 10))(x), r"gives \(None, 1, 1, 10\); accuracy"),
    ],
)
def test_a_net_that_is_no_classifier_is_refused(made, recipe, digits, layer, why):
    with pytest.raises(ValueError, match=rf"tiny \[model\]: .*float\.keras {why}"):
        preflight.check(read_recipe(recipe()), digits, ending_in(made, layer))


@pytest.mark.parametrize("tuned", [{}, {"reconstruct": STEPS}])
def test_a_recipe_that_trains_nothing_is_refused(made, recipe, digits, tuned):
    path = recipe(model={"architecture": "resnet8"}, train={"epochs": 0}, **tuned)
    model = files.load_model(made / "float.keras")
    with pytest.raises(ValueError, match=r"tiny: nothing is trained.*\[pretrain\]"):
        preflight.check(read_recipe(path), digits, model)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"architecture": "resnet8"}, "train": {"epochs": 1}},
        {"model": {"architecture": "resnet8"}, "pretrain": {"epochs": 1}},
        {"model": {"architecture": "resnet8", "weights": "some.npz"}},
    ],
)
def test_weights_are_given_or_trained(made, recipe, digits, sections, monkeypatch):
    """The check goes on to its last question, whether a file can hold the model."""
    asked, check = [], preflight.tflite_export.check

    def asking(model, target, **options):
        asked.append(check(model, target, **options))
        return asked[-1]

    monkeypatch.setattr(preflight.tflite_export, "check", asking)
    path = recipe(**{"train": {"epochs": 0}, **sections})
    preflight.check(read_recipe(path), digits, files.load_model(made / "float.keras"))
    assert asked == [[]]
