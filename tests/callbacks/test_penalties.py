"""Kernels by name, also where two models inside have one."""

import keras
import numpy as np

from keras_lowbit import calibrate, quantize_model
from keras_lowbit.callbacks import DampenOscillations, TernaryPhases
from keras_lowbit.callbacks.penalties import kernels_of
from keras_lowbit.distillation import MutualDistiller
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.training import Stage, stages
from tests.callbacks import tiny


def twins(scheme):
    """A mutual distiller of two students whose name is one, and the students."""
    floating = tiny.float_model()
    students = [calibrate(quantize_model(floating, scheme), tiny.images()[0]) for _ in range(2)]
    assert students[0].name == students[1].name
    both = MutualDistiller(floating, students)
    both.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return both, students


def test_two_students_of_one_name_have_all_their_kernels():
    both, students = twins("w4a4")
    found = kernels_of(both)
    alone = [kernel.latent for student in students for kernel in kernels_of(student).values()]
    assert {id(kernel.latent) for kernel in found.values()} == set(map(id, alone))
    first = students[0].name
    assert {f"{first}/middle", f"{first}/middle_2"} < set(found)


def test_both_students_are_dampened():
    both, students = twins("w3a3")
    x, y = tiny.images()
    both.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[DampenOscillations()])
    counts = [
        sum(k.latent.regularizer is not None for k in kernels_of(one).values()) for one in students
    ]
    assert counts[0] == counts[1] > 0


def test_both_students_begin_their_ternary_phase_together():
    both, students = twins("wta8")
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kernels = [[s.quantizer for s in sites_of(one)] for one in students]
            seen.append([[q.enabled for q in of if q.role == "kernel"] for of in kernels])

    x, y = tiny.images()
    both.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[TernaryPhases(1), Look()])
    assert all(first == second for first, second in seen)
    assert not np.all(seen[0])
    assert np.all(seen[-1])


def test_both_students_are_frozen_by_a_stage():
    both, students = twins("w4a4")
    with stages.frozen(both, Stage("a", 4, 4, 1, 1e-3, frozen=("middle",))):
        assert not any(one.get_layer("middle").trainable for one in students)
