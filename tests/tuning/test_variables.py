"""What reconstruction trains: gradients and rates by hand (`methods` in units of codes)."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.quantizers import LSQ, PACT
from keras_lowbit.tuning.block_model import Rates, logit_error, squared_error
from keras_lowbit.tuning.optimizer import RatedByIdentity
from keras_lowbit.tuning.variables import ActivationScale, KernelInCodes, code_rate
from tests.gradients import gradient


def add(name, value):
    return keras.Variable(np.asarray(value, "float32"), name=name)


def quantizer(shape, scale, **options):
    made = LSQ(4, **options)
    made.build(shape)
    made.scale.assign(np.broadcast_to(np.float32(scale), made.scale.shape))
    return made


def test_a_kernel_in_codes_has_the_gradients_of_the_module():
    """Scale 0.5: v = 1.2, -2.6, 10; codes 1, -3, 7. With g = 1, 2, 3 to the values:

    d/dv = g s = 0.5, 1, 0 (outside)         d/dlog_s = s (1 - 6 + 21) = 8
    """
    latent = keras.Variable(np.float32([0.6, -1.3, 5.0]))
    state = KernelInCodes("k", latent, quantizer((3,), 0.5), add)

    def loss(_):
        codes, scale = state.encode(None)
        return ops.sum(codes * ops.stop_gradient(scale) * ops.convert_to_tensor([1.0, 2.0, 3.0]))

    _, to_v, to_log = gradient(loss, [0.0], variables=[state.codes_variable, state.log_scale])
    np.testing.assert_allclose(to_v, [0.5, 1, 0], rtol=1e-6)  # float32
    np.testing.assert_allclose(to_log, 8, rtol=1e-6)  # float32


def test_an_activation_has_the_gradients_of_the_module():
    """Scale 0.5: x / s = 1.2, 20; codes 1, 7. g = 1, 2: d/dlog_s = 0.5 (-0.2 + 14) = 6.9"""
    made = quantizer((None, 2), 0.5, role="activation")
    state = ActivationScale("a", made, add, 0.0, None)

    def loss(x):
        codes, scale = state.encode(x)
        return ops.sum(codes * ops.stop_gradient(scale) * ops.convert_to_tensor([1.0, 2.0]))

    to_x, to_log = gradient(loss, [[0.6, 10.0]], variables=[state.log_scale])
    np.testing.assert_allclose(to_x, [[1, 0]], rtol=1e-6)  # float32
    np.testing.assert_allclose(to_log, 6.9, rtol=1e-5)  # float32


def test_dropped_elements_are_real_and_move_no_scale():
    made = quantizer((None, 2), 0.5, role="activation")
    state = ActivationScale("a", made, add, 1.0, keras.random.SeedGenerator(0))

    def values(x):
        codes, scale = state.encode(x)
        return codes * ops.stop_gradient(scale)

    x = np.float32([[0.6, 10.0]])
    # Float32.
    np.testing.assert_allclose(ops.convert_to_numpy(values(ops.convert_to_tensor(x))), x, rtol=1e-6)
    to_x, to_log = gradient(lambda t: ops.sum(values(t)), x, variables=[state.log_scale])
    np.testing.assert_allclose(to_x, [[1, 1]], rtol=1e-6)  # float32
    assert to_log == 0


def test_half_of_the_elements_are_dropped():
    made = quantizer((None, 4000), 1.0, role="activation")
    state = ActivationScale("a", made, add, 0.5, keras.random.SeedGenerator(0))
    found = [ops.convert_to_numpy(state.encode(ops.full((2, 4000), 0.25))[0]) for _ in range(2)]
    share = np.mean(found[0] == 0)
    assert abs(share - 0.5) < 0.04  # five standard deviations
    # One draw for all images of a step, another one in the next step.
    np.testing.assert_array_equal(found[0][0], found[0][1])
    assert np.mean(found[0] == found[1]) < 0.6


def test_a_relu6_limits_the_scale_in_training_too():
    """At the limit, 0.4, the log scale still learns: x = 1 is code 2.5, rounded to 2.

    d/dlog_s = s (2 - 2.5) g = -0.2 with g = 1 to the value.
    """
    made = quantizer((None, 1), 9.0, role="activation", signed=False, max_value=6.0)
    state = ActivationScale("a", made, add, 0.0, None)
    _, scale = state.encode(ops.ones((1, 1)))
    np.testing.assert_allclose(ops.convert_to_numpy(scale), 6 / 15, rtol=1e-6)  # float32

    def value(x):
        codes, scale = state.encode(x)
        return ops.sum(codes * ops.stop_gradient(scale))

    _, to_log = gradient(value, [[1.0]], variables=[state.log_scale])
    np.testing.assert_allclose(to_log, -0.2, rtol=1e-5)  # float32: 2 - 2.5 loses two bits


def test_writing_gives_the_layer_the_codes_that_were_trained():
    latent = keras.Variable(np.float32([[0.6, 1.0], [-1.3, 0.2]]))
    made = quantizer((2, 2), [0.5, 0.25], axis=-1)
    state = KernelInCodes("k", latent, made, add)
    state.codes_variable.assign([[2.2, 3.3], [-1.4, 9.0]])
    state.log_scale.assign(np.log([0.125, 2.0]))
    want = [ops.convert_to_numpy(v) for v in state.encode(None)]
    state.write()
    got = [ops.convert_to_numpy(v) for v in made.encode(ops.convert_to_tensor(latent))]
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[0], [[2, 3], [-1, 7]])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)  # float32


def test_quantizers_without_a_scale_to_tune_are_refused():
    with pytest.raises(ValueError, match="act: PACT keeps no scale variable"):
        ActivationScale("act", PACT(4), add, 0.0, None)
    binary = quantizer((3,), 0.5)
    binary.set_bits(1)
    with pytest.raises(ValueError, match="conv: kernels of 1 bit"):
        KernelInCodes("conv", keras.Variable(np.ones(3, "float32")), binary, add)


def test_code_rates_are_those_measured_at_4_and_8_bits():
    rates = [code_rate(bits, 6e-3, 6e-2) for bits in (2, 4, 6, 8)]
    np.testing.assert_allclose(rates, [6e-3, 6e-3, 6e-3 * 10**0.5, 6e-2])
    with pytest.raises(ValueError, match="biases must be a finite number, above 0"):
        Rates(biases=0)


def test_codes_rest_at_all_widths_or_at_none():
    assert [code_rate(bits, 0, 0) for bits in (2, 4, 6, 8)] == [0.0] * 4
    assert Rates(codes_4bit=0, codes_8bit=0).codes_8bit == 0
    with pytest.raises(ValueError, match=r"are both above 0, or both 0\. Got 0 and 0\.06"):
        Rates(codes_4bit=0)
    with pytest.raises(ValueError, match="codes_8bit must be a finite number, at least 0"):
        Rates(codes_8bit=-1)


def test_each_variable_steps_at_its_own_rate():
    """Adam's first step is the rate, whatever the gradient's size."""
    one, two = add("one", 1.0), add("two", 1.0)
    optimizer = RatedByIdentity({id(one): 0.5, id(two): 0.01}, learning_rate=0.1)
    optimizer.build([one, two])
    optimizer.apply([ops.full((), 3.0), ops.full((), -700.0)])
    found = [float(ops.convert_to_numpy(v)) for v in (one, two)]
    np.testing.assert_allclose(found, [0.95, 1.001], rtol=1e-5)  # float32


def test_losses_by_hand():
    """Errors 1 and 9 of variance 4: 5 / 4. KL of (1/2, 1/2) to (1/4, 3/4): log(2/sqrt(3))."""
    a, b = ops.convert_to_tensor([[0.0, 0.0]]), ops.convert_to_tensor([[1.0, 3.0]])
    np.testing.assert_allclose(float(squared_error([4.0])([a], [b])), 1.25)
    b = ops.convert_to_tensor([[0.0, float(np.log(3))]])
    # Float32.
    np.testing.assert_allclose(float(logit_error([a], [b])), np.log(2 / np.sqrt(3)), rtol=1e-5)
