"""A student under a frozen teacher: what its layers add to the loss counts."""

import keras
import numpy as np
import pytest

from keras_lowbit.callbacks import attach_dampening
from keras_lowbit.distillation import Distiller, MutualDistiller
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def distiller(student, student_loss_weight=1.0, teacher=None, of_features=False):
    if of_features:
        wanted = keras.distillation.FeatureDistillation("mse", "relu2", "relu2_dequantize")
    else:
        wanted = keras.distillation.LogitsDistillation(1.0, keras.losses.KLDivergence())
    made = Distiller(
        teacher=teacher or tiny.float_model(),
        student=student,
        distillation_losses=wanted,
        student_loss_weight=student_loss_weight,
    )
    made.compile(keras.optimizers.SGD(0.0), loss(), jit_compile=False)
    return made


def total(model, x, y):
    return model.evaluate(x, y, verbose=0, return_dict=True)["loss"]


def test_penalties_of_the_students_layers_are_in_the_loss():
    x, y = tiny.images(8)
    student = calibrate(quantize_model(tiny.float_model(), "w2a2"), x)
    without = total(distiller(student), x, y)
    attach_dampening(student, 1000.0)
    tiny.compile_(student)
    added = float(sum(np.asarray(keras.ops.convert_to_numpy(one)) for one in penalties(student, x)))
    assert added > 1.0
    # Float32 sums.
    assert total(distiller(student), x, y) == pytest.approx(without + added, rel=1e-5)
    # The same sum as the plain model trains on.
    assert total(student, x, y) == pytest.approx(without + added, rel=1e-5)


# Of Keras' extractors of features, which take a list of the one input.
@pytest.mark.filterwarnings(r"ignore:(?s).*structure of `inputs`:UserWarning")
@pytest.mark.parametrize("of_features", [False, True])
def test_penalties_that_layers_add_in_a_step_count_once(of_features):
    """One step at a rate of 0 with and without the pull on channels' ranges, as the plain model.

    Extractors of features run the student once more, and on JAX losses of a step are with the
    model that fits alone.
    """
    x, y = tiny.images(8)

    # Apart: a distiller freezes its teacher, and what is quantized from it would be frozen too.
    floating, teacher = tiny.float_model(), tiny.float_model()

    def loss_of(weight, distilled):
        scheme = Scheme(2, 2, activation="channel_balanced", activation_options={"weight": weight})
        student = calibrate(quantize_model(floating, scheme), x)
        student.compile(keras.optimizers.SGD(0.0), loss(), jit_compile=False)
        made = distiller(student, 0.5, teacher, of_features) if distilled else student
        return made.fit(x, y, batch_size=8, verbose=0, shuffle=False).history["loss"][0]

    added = loss_of(50.0, distilled=False) - loss_of(0.0, distilled=False)
    assert added > 1.0
    got = loss_of(50.0, distilled=True) - loss_of(0.0, distilled=True)
    assert got == pytest.approx(added, rel=1e-4)  # differences of float32 losses


def penalties(model, x):
    model(x, training=False)
    return model.losses


@pytest.mark.parametrize("task_loss", [loss(), "sparse_categorical_crossentropy"])
def test_a_distiller_saves_amid_training_and_goes_on(tmp_path, task_loss):
    x, y = tiny.images(16)
    teacher, student = tiny.float_model(), calibrate(quantize_model(tiny.float_model(), "w4a4"), x)
    model = distiller(student, 0.5, teacher)
    options = {"loss": task_loss, "metrics": ["accuracy"], "jit_compile": False}
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), **options)
    model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    model.save(tmp_path / "amid.keras")
    loaded = keras.models.load_model(tmp_path / "amid.keras")
    # The same sums in the same order.
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))
    for one in (model, loaded):
        one.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.student.get_weights(), loaded.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # float32, summed by another graph
    # Velocities, as exact as the weights.
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (a, b)), atol=1e-6)


def test_a_mutual_distiller_saves_amid_training_and_loads(tmp_path):
    x, _ = tiny.images()
    student = calibrate(quantize_model(tiny.float_model(), "w4a4"), x)
    made = MutualDistiller(
        tiny.float_model(), [student], temperature=2.0, hints=[("relu2", "relu2_quantize")]
    )
    made.compile(keras.optimizers.SGD(0.01), loss(), jit_compile=False)
    save = keras.callbacks.ModelCheckpoint(str(tmp_path / "m.keras"))
    tiny.train(made, [save], epochs=1)
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.get_config()["temperature"] == [2.0]
    assert again.hints == made.hints
    assert again.optimizer.iterations == made.optimizer.iterations == 3
    outputs = [keras.ops.convert_to_numpy(m(x, training=False)) for m in again.quantized_models]
    np.testing.assert_array_equal(
        outputs[0], keras.ops.convert_to_numpy(student(x, training=False))
    )


def test_models_that_end_in_probabilities_are_refused():
    inner = tiny.float_model()
    model = keras.Model(inner.inputs, keras.layers.Softmax()(inner.output), name="probable")
    with pytest.raises(ValueError, match="probable ends in probabilities"):
        MutualDistiller(model, [quantize_model(model, "w4a4")])
