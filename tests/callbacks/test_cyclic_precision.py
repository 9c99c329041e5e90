"""Bits on a cosine: like CPT, arXiv:2101.10093, turned round."""

import keras
import pytest

from keras_lowbit.callbacks import (
    BatchNormReestimation,
    BitDescent,
    CyclicPrecision,
    batch_norm,
)
from tests.callbacks import tiny

LOW = "middle.kernel_quantizer"


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.bits = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.bits.append(tiny.bits(self.model))


def test_bits_fall_along_half_a_cosine_in_each_cycle():
    """u = 0, 1/4, 1/2, 3/4, 1: (1 + cos) / 2 = 1, 0.854, 0.5, 0.146, 0.

    2 + 6 of that: 8, 7.12, 5, 2.88, 2.
    """
    plan = CyclicPrecision(2, 8, cycles=2, epochs=10).plan
    assert [plan[epoch] for epoch in range(10)] == [8, 7, 5, 3, 2] * 2


def test_halves_go_up_and_uneven_cycles_end_at_low():
    """3 to 4 bits over 3 epochs: 4, 3.5, 3; 5 epochs are cut into 2 and 3."""
    plan = CyclicPrecision(3, 4, cycles=2, epochs=5).plan
    assert [plan[epoch] for epoch in range(5)] == [4, 3, 4, 4, 3]


def test_quantizers_follow_and_epochs_after_the_schedule_stay_low():
    model, watch = tiny.model("w2a2"), Watch()
    before = tiny.bits(model)
    tiny.train(model, [CyclicPrecision(2, 4, cycles=2, epochs=4), watch], epochs=5)
    assert [b[LOW] for b in watch.bits] == [4, 2, 4, 2, 2]
    ends = {name for name, bits in before.items() if bits == 8}
    assert ends
    assert all(b[name] == 8 for b in watch.bits for name in ends)


def test_it_shares_a_fit_with_a_descent_of_the_other_role():
    model, watch = tiny.model("w2a2"), Watch()
    cyclic = CyclicPrecision(2, 4, cycles=1, epochs=2, targets="weights")
    tiny.train(model, [cyclic, BitDescent({0: 3, 1: 2}, targets="activations"), watch], epochs=2)
    got = [(b[LOW], b["relu1_quantize.quantizer"]) for b in watch.bits]
    assert got == [(4, 3), (2, 2)]


def test_batch_norms_follow_each_change(monkeypatch):
    seen = []
    monkeypatch.setattr(
        batch_norm, "reestimate", lambda model, *_: seen.append(tiny.bits(model)[LOW])
    )
    cyclic = CyclicPrecision(2, 4, cycles=2, epochs=4)
    follows = BatchNormReestimation(tiny.images()[0], at_end=False, after=cyclic)
    tiny.train(tiny.model("w2a2"), [follows, cyclic], epochs=5)
    assert seen == [4, 2, 4, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 1, 8), "low must be below high"),
        ((2, 9, 1, 8), "high at most 8"),
        ((0, 4, 1, 8), "low must be a whole number of at least 1"),
        ((2, 4, 0, 8), "cycles must be a whole number"),
        ((2, 4, 3, 5), "at least 2 epochs. Got 5 epochs for 3 cycles; give 6 epochs or more"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CyclicPrecision(*arguments)
