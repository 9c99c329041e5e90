import keras
import numpy as np
import pytest

from keras_lowbit.callbacks import ExportGapMonitor, TwoStage, export_gap
from keras_lowbit.distillation import MutualDistiller
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny


class Answers:
    """Stands for a frozen model that answers class 0 but for the first image."""

    inputs = (keras.KerasTensor((None, *tiny.SHAPE)),)

    def predict(self, x, **_):
        logits = np.zeros((len(x), 3))
        logits[0, 1] = 1.0
        logits[1:, 0] = 1.0
        return logits


def test_shares_are_those_counted_by_hand(monkeypatch):
    x, y = tiny.images(6)  # classes 0 1 2 0 1 2
    monitor = ExportGapMonitor((x, y), verbose=0)
    model = keras.Sequential([keras.Input(tiny.SHAPE), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3, kernel_initializer="zeros", bias_initializer="zeros"))
    tiny.compile_(model)
    monitor.set_model(model)
    monkeypatch.setattr(export_gap, "freeze", lambda model: Answers())
    # The frozen model answers 1 0 0 0 0 0: only image 3 is right. The trained one answers
    # 0 everywhere (argmax of equals): image 0 differs.
    assert monitor.measure() == (1 / 6, 1 / 6)
    one_hot = ExportGapMonitor((x, np.eye(3)[y]), verbose=0)
    one_hot.set_model(model)
    assert one_hot.measure() == (1 / 6, 1 / 6)


def test_the_logs_get_the_figures_every_n_epochs_and_at_the_end(capsys):
    x, y = tiny.images()
    history = tiny.train(tiny.model(), [ExportGapMonitor((x, y), every=2)], epochs=3).history
    assert len(history["loss"]) == 3
    assert len(history["frozen_accuracy"]) == len(history["export_gap"]) == 2
    assert all(0 <= value <= 1 for value in history["frozen_accuracy"])
    # One image near a boundary may change sides; agreement on a whole is the export's promise.
    assert max(history["export_gap"]) <= 1 / 24
    assert capsys.readouterr().out.count("frozen accuracy") == 2


def test_one_output_value_names_no_class():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs), name="yes_or_no")
    monitor = ExportGapMonitor((np.zeros((2, 4)), np.zeros(2)))
    monitor.set_model(model)
    with pytest.raises(ValueError, match="yes_or_no has one output value, which names no class"):
        monitor.on_train_begin()


def test_a_model_that_cannot_be_frozen_is_refused_before_the_first_step():
    model = quantize_model(tiny.float_model(), "w4a4")  # never calibrated
    tiny.compile_(model)
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(ValueError, match="calibrate"):
        tiny.train(model, [ExportGapMonitor(tiny.images())], epochs=1)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 2)), "the pair"),
        ((np.zeros((0, 2)), np.zeros(0)), "common length above 0. Got 0 and 0"),
        ((np.zeros((3, 2)), np.zeros(2)), "Got 3 and 2"),
    ],
)
def test_bad_data_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        ExportGapMonitor(data)


def test_while_quantizers_wait_nothing_is_logged(capsys):
    x, y = tiny.images()
    history = tiny.train(tiny.model(), [TwoStage(1), ExportGapMonitor((x, y))], epochs=2).history
    assert "Epoch 1: quantizers are switched off" in capsys.readouterr().out
    assert len(history["export_gap"]) == 1


def test_under_a_distiller_the_quantized_model_is_watched():
    x, y = tiny.images()
    both = MutualDistiller(tiny.float_model(), [tiny.model(compiled=False)])
    both.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    history = tiny.train(both, [ExportGapMonitor((x, y), verbose=0)], epochs=1).history
    assert len(history["frozen_accuracy"]) == 1
