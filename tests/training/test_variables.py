"""Weight decay and rates of what quantizers learn."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.layers import QuantizedDense
from keras_lowbit.quantizers import LSQ
from keras_lowbit.training import exclude_from_weight_decay, quantizer_rates
from tests.callbacks import tiny


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def test_decay_acts_on_kernels_alone():
    """Zero gradients, rate 0.5, decay 0.1: kernels fall to 0.95 of themselves."""
    model = tiny.model(compiled=False)
    optimizer = exclude_from_weight_decay(keras.optimizers.SGD(0.5, weight_decay=0.1), model)
    variables = model.trainable_variables
    before = [numpy(v) for v in variables]
    optimizer.build(variables)
    optimizer.apply([ops.zeros(v.shape) for v in variables])
    kernels = 0
    for variable, old in zip(variables, before, strict=True):
        kernel = variable.path.endswith("/kernel")
        kernels += kernel
        # Float32.
        np.testing.assert_allclose(numpy(variable), old * (0.95 if kernel else 1.0), rtol=1e-6)
    assert kernels == 3


def test_scales_with_two_axes_as_those_of_depthwise_kernels_do_not_decay():
    layer = QuantizedDense(2, kernel_quantizer=LSQ(4, axis=(-2, -1)))
    model = keras.Sequential([keras.Input((3,)), layer])
    learned = layer.kernel_quantizer.trainable_variables
    assert [tuple(v.shape) for v in learned] == [(3, 2)]
    optimizer = exclude_from_weight_decay(keras.optimizers.AdamW(1.0), model)
    optimizer.build(model.trainable_variables)
    before = [numpy(v) for v in learned]
    optimizer.apply([ops.zeros(v.shape) for v in model.trainable_variables])
    for variable, old in zip(learned, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), old)


def test_what_a_loaded_model_trains_on_with_is_told_again():
    """Files of Keras forget what does not decay; a loaded optimizer, built and traced, is told."""
    model = tiny.model(compiled=False)
    jit = keras.backend.backend() == "jax"
    sgd = keras.optimizers.SGD(0.5, weight_decay=0.1)
    model.compile(sgd, lambda y, p: 0.0 * ops.sum(p, axis=-1), jit_compile=jit)
    x, y = tiny.images()
    gain, kernel = model.get_layer("bn1").gamma, model.get_layer("middle").kernel
    model.fit(x, y, batch_size=8, verbose=0)
    # Three steps at 0.95 each, in float32.
    np.testing.assert_allclose(numpy(gain), 0.95**3, rtol=1e-6)
    assert exclude_from_weight_decay(model.optimizer, model) is sgd
    gain_before, before = numpy(gain), numpy(kernel)
    model.fit(x, y, batch_size=8, verbose=0)
    np.testing.assert_array_equal(numpy(gain), gain_before)
    np.testing.assert_allclose(numpy(kernel), before * 0.95**3, rtol=1e-6)  # as above


def test_rates_name_the_variables_of_quantizers_and_no_others():
    model = tiny.model(compiled=False)
    rates = quantizer_rates(model, 0.01)
    scales = [v.path for v in model.trainable_variables if v.path.endswith("scale")]
    assert len(rates) == len(scales)
    assert set(rates.values()) == {0.01}
    for v in model.trainable_variables:
        fits = [pattern for pattern in rates if re.search(pattern, v.path)]
        assert len(fits) == (v.path in scales)


@pytest.mark.once
def test_what_has_nothing_to_exclude_or_rate_is_refused():
    with pytest.raises(ValueError, match="has no weight decay: give weight_decay"):
        exclude_from_weight_decay(keras.optimizers.SGD(0.1), tiny.model(compiled=False))
    with pytest.raises(ValueError, match="no quantizer of tiny trains a scale or levels"):
        quantizer_rates(tiny.float_model(), 0.1)
