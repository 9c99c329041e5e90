import json

import numpy as np
import pytest

from keras_lowbit.callbacks import ChannelBalanceDecay, StochasticPrecision, TernaryPhases, TwoStage
from keras_lowbit.cli.fitting import read_history
from keras_lowbit.cli.methods import callbacks_of, stages_of
from keras_lowbit.cli.recipe import read_recipe

W2A2 = "[quantize]\nscheme = 'w2a2'\n"
DESCENT = "[train]\nepochs = 11\nbit_descent = {0 = 4, 2 = 3, 3 = 2}\n"


def read(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return read_recipe(path)


@pytest.mark.once
@pytest.mark.parametrize(
    ("train", "methods", "why"),
    [
        ("", "stochastic = 0.5", "need a [quantize] scheme and [train] epochs above 0"),
        ("epochs = 4", "two_stage = 'weights'", "two_stage must be one of"),
        ("epochs = 4", "two_stage = 'weights_first'", "switch_epoch must be from 1 to 3"),
        ("epochs = 4", "two_stage = 'weights_first'\nswitch_epoch = 4", "must be from 1 to 3"),
        ("epochs = 4", "switch_epoch = 2", "switch_epoch belongs to two_stage or pull"),
        ("epochs = 4", "stochastic = 1.5", "stochastic must lie in 0..1. Got 1.5"),
        ("epochs = 4", "mutual = true", "mutual needs [train] distill"),
        ("epochs = 4", "pull = -1", "pull must be at least 0"),
        ("epochs = 4", "pull = 1", "pull needs ternary kernels"),
        ("epochs = 4", "balance = true", "balance needs [quantize] activation"),
        ("epochs = 4", "snap_epoch = 3", "snap_epoch needs [quantize] kernel = 'levels'"),
        ("epochs = 4", "cycles = 1", "cycles need [train] bit_descent from epoch 0"),
        ("epochs = 4", "cycles = -1", "cycles and return_epochs must be at least 0"),
        ("epochs = 4", "return_epochs = 1", "return_epochs needs cycles"),
        ("epochs = 5\nbit_descent = {0 = 4, 1 = 2}", "cycles = 2", "return_epochs is the float"),
        (
            "epochs = 5\nbit_descent = {0 = 4, 1 = 2}",
            "cycles = 1\nstochastic = 0.5",
            "cycles go with distill and mutual only",
        ),
        (
            "epochs = 6\nbit_descent = {0 = 4, 1 = 2}",
            "cycles = 2\nreturn_epochs = 1",
            "6 epochs less 1 times 1 must be 2 cycles of one length above 1",
        ),
    ],
)
def test_a_slip_among_the_methods_is_one_error_with_its_place(tmp_path, train, methods, why):
    with pytest.raises(ValueError, match=r"r\.toml \[methods\]") as caught:
        read(tmp_path, f"{W2A2}[train]\n{train}\n[methods]\n{methods}")
    assert why in str(caught.value)


@pytest.mark.once
def test_cycles_share_the_epochs_with_what_lies_between(tmp_path):
    recipe = read(tmp_path, f"{W2A2}{DESCENT}[methods]\ncycles = 2\nreturn_epochs = 1")
    plan, between = stages_of(recipe.methods, recipe.train)
    # 11 = 5 + 1 + 5, and a cycle of 5 is 2 at 4 bits, 1 at 3, 2 at 2.
    found = [(stage.bits, stage.epochs) for stage in plan.stages]
    assert found == [((4, 4), 2), ((3, 3), 1), ((2, 2), 2)]
    assert (between.bits, between.epochs) == ((32, 32), 1)


@pytest.mark.once
def test_ternary_schemes_keep_their_quantizer_and_take_options(tmp_path):
    text = "[quantize]\nscheme = 'wta8'\nkernel_options = {gradient = 'sigmoid'}"
    scheme = read(tmp_path, text).scheme
    assert (scheme.kernel, scheme.kernel_bits) == ("ternary", 2)
    assert scheme.kernel_options == {"gradient": "sigmoid"}


@pytest.mark.once
def test_each_method_is_its_callback(tmp_path):
    images = np.zeros((300, 4, 4, 1), "float32")

    def made(methods, quantize=W2A2):
        recipe = read(tmp_path, f"{quantize}[train]\nepochs = 4\nbatch_size = 2\n{methods}")
        return callbacks_of(recipe.methods, recipe.train, images)

    assert made("") == []
    (one,) = made("[methods]\ntwo_stage = 'activations_first'\nswitch_epoch = 2")
    assert isinstance(one, TwoStage)
    assert (one.switch_epoch, one.order) == (2, "activations_first")
    (one,) = made("[methods]\nstochastic = 0.25")
    assert isinstance(one, StochasticPrecision)
    assert one.p0 == 0.25
    (one,) = made("[methods]\npull = 2\nswitch_epoch = 1", "[quantize]\nscheme = 'wta8'\n")
    assert isinstance(one, TernaryPhases)
    assert (one.strength, one.switch_epoch, one.steps) == (2.0, 1, 50)
    assert one.data is images
    channel = f"{W2A2}activation = 'channel_balanced'\n"
    assert isinstance(made("[methods]\nbalance = true", channel)[0], ChannelBalanceDecay)


METHODS = {
    "two stages": ({}, {"two_stage": "weights_first", "switch_epoch": 1}, {}),
    "stochastic and mutual": ({"distill": 0.5}, {"stochastic": 0.5, "mutual": True}, {}),
    "cycles": (
        {"epochs": 5, "bit_descent": {"0": 4, "1": 2}, "distill": 0.5},
        {"cycles": 2, "return_epochs": 1},
        {},
    ),
    "ternary": (
        {},
        {"pull": 1.0, "switch_epoch": 1},
        {"scheme": "wta8", "kernel_options": {"gradient": "sigmoid"}},
    ),
    "balanced": ({}, {"balance": True}, {"activation": "channel_balanced"}),
    "levels": ({}, {"snap_epoch": 2}, {"kernel": "levels"}),
    "levels, snapped at the end": ({}, {}, {"kernel": "levels"}),
}


@pytest.mark.runtime
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_exports_the_integers_it_trained(run, recipe, tmp_path, name):
    train, methods, quantize = METHODS[name]
    quantize = {"scheme": "w2a2", **quantize}
    path = recipe(train=train, methods=methods, quantize=quantize)
    outcome = run("train", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["files"]["model_int8.tflite"]["wrong_codes"] == 0
    rows = read_history(tmp_path / "out" / "history.csv")
    assert [row["epoch"] for row in rows] == list(range(train.get("epochs", 3)))
    assert all(np.isfinite(list(row.values())).all() for row in rows)
