"""Steps at rates of each variable's own."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.optimizers import RatedAdam, RatedSGD
from keras_lowbit.training import quantizer_rates
from tests.callbacks import tiny


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def variable(name):
    return keras.Variable(np.float32(1.0), name=name)


def stepped(optimizer, times=1):
    """`scale`, `kernel` after steps with the gradients 3 and 3."""
    pair = [variable("scale"), variable("kernel")]
    optimizer.build(pair)
    for _ in range(times):
        optimizer.apply([ops.full((), 3.0), ops.full((), 3.0)])
    return [float(numpy(v)) for v in pair]


def test_sgd_by_hand():
    """Rate 0.1: 1 - 0.3, and a tenth of it. Momentum 1/2: the second step is 3/2 of the first."""
    assert stepped(RatedSGD(0.1, rates={"scale$": 0.1})) == pytest.approx([0.97, 0.7])
    found = stepped(RatedSGD(0.1, momentum=0.5, rates={"scale$": 0.1}), times=2)
    assert found == pytest.approx([1 - 0.03 * 2.5, 1 - 0.3 * 2.5])


def test_adams_first_step_is_the_rate():
    assert stepped(RatedAdam(0.1, rates={"scale$": 0.01})) == pytest.approx([0.999, 0.9])


def test_the_first_pattern_that_fits_counts():
    assert stepped(RatedSGD(0.1, rates={"sca": 0.0, "": 0.5})) == pytest.approx([1.0, 0.85])


def test_compiled_steps_take_them_and_files_keep_them(tmp_path):
    model = tiny.model(compiled=False)
    model.compile(
        RatedSGD(0.1, rates=quantizer_rates(model, 0.0)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    before = {v.path: numpy(v) for v in model.trainable_variables}
    tiny.train(model, [], epochs=1)
    still = {v.path for v in model.trainable_variables if (numpy(v) == before[v.path]).all()}
    scales = {path for path in before if path.endswith("scale")}
    assert len(scales) > 4
    assert scales <= still
    assert not {path for path in still if path.endswith("kernel")}
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    assert again.optimizer.rates


@pytest.mark.once
def test_what_cannot_be_meant_is_refused():
    with pytest.raises(
        ValueError,
        match=r"RatedSGD: the rate of 'scale' must be .* at least 0\. Got -1",
    ):
        RatedSGD(0.1, rates={"scale": -1})
    with pytest.raises(ValueError, match=r"no trainable variable has \['scael'\] in its path"):
        stepped(RatedSGD(0.1, rates={"scael": 0.1}))
