"""Ternary kernels by numbers worked by hand.

Threshold and scale: Li et al., Ternary Weight Networks, arXiv:1605.04711, eqs. 5-6; re-scaled
gradients: a reconstruction from the abstract of arXiv:2212.12649.
"""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.layers import packed_kernels
from keras_lowbit.numerics import ternary
from keras_lowbit.quantizers import Ternary
from tests.gradients import gradient

# Magnitudes 1.0, 0.9, 0.3, 0.1, 0.2: mean 0.5, Delta 0.35.
X = np.float32([1.0, -0.9, 0.3, -0.1, 0.2])
# Gradients to the outputs.
DQ = ops.convert_to_tensor(np.float32([1, 2, 3, 4, 5]))


def built(shape=(5,), **options):
    quantizer = Ternary(**options)
    quantizer.build(shape)
    quantizer.fit_scale(np.ones(shape, np.float32))
    return quantizer


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


def tensors(*arrays):
    return [ops.convert_to_tensor(np.float32(a)) for a in arrays]


def sigmoid_slope(z):
    return 1 / (2 + np.exp(z) + np.exp(-z))


class TestProjection:
    def test_codes_and_scale_of_the_seven_tenths_rule(self):
        codes, scale = encode(built(), X)
        np.testing.assert_array_equal(codes, [1, -1, 0, 0, 0])
        np.testing.assert_allclose(scale, 0.95, rtol=1e-6)  # float32

    def test_each_filter_has_a_threshold_and_a_scale_of_its_own(self):
        x = np.stack([X, 10 * X[::-1]], axis=-1)
        codes, scale = encode(built((5, 2), axis=-1), x)
        np.testing.assert_array_equal(codes, [[1, 0], [-1, 0], [0, 0], [0, -1], [0, 1]])
        np.testing.assert_allclose(scale, [0.95, 9.5], rtol=1e-6)  # float32

    @pytest.mark.parametrize(("zeros", "kept"), [(0.0, 5), (0.2, 4), (0.4, 3), (0.8, 1)])
    def test_a_quantile_leaves_the_share_of_zeros_asked_for(self, zeros, kept):
        codes, scale = encode(built(threshold="quantile", zeros=zeros), X)
        largest = np.sort(np.abs(X))[::-1][:kept]
        assert np.abs(codes).sum() == kept
        np.testing.assert_allclose(scale, largest.mean(), rtol=1e-6)  # float32

    def test_a_learned_threshold_starts_at_the_rule_and_moves_with_its_variable(self):
        quantizer = built(threshold="learned")
        np.testing.assert_array_equal(encode(quantizer, X)[0], [1, -1, 0, 0, 0])
        quantizer.ratio.assign(0.5)  # Delta 0.25
        np.testing.assert_array_equal(encode(quantizer, X)[0], [1, -1, 1, 0, 0])

    def test_a_learned_scale_starts_at_least_squares(self):
        quantizer = built(scale="learned")
        quantizer.fit_scale(X)
        np.testing.assert_allclose(encode(quantizer, X)[1], 0.95, rtol=1e-6)  # float32
        quantizer.scale.assign(2.0)
        assert encode(quantizer, X)[1] == 2

    def test_gaussian_weights_get_the_zeros_and_the_cosine_of_the_papers_rule(self):
        x = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
        codes, _ = encode(built(x.shape), x)
        # 0.7 sqrt(2 / pi) = 0.5585 deviations: 42.35 % lie inside; 0.2 % is two standard errors.
        assert np.mean(codes == 0) == pytest.approx(0.4235, abs=2e-3)
        cosine = ops.convert_to_numpy(ternary.cosine(*tensors(x, codes), (0,)))
        # 2 phi(0.5585) / sqrt(0.5765) = 0.8990
        assert cosine == pytest.approx(0.899, abs=1e-3)

    def test_the_error_is_that_of_the_angle(self):
        """min over a of |x - a T|^2 = |x|^2 (1 - cos^2), exactly."""
        codes, scale = encode(built(), X)
        cosine = float(ops.convert_to_numpy(ternary.cosine(*tensors(X, codes), (0,))))
        error = np.sum((X - scale * codes) ** 2)
        # 1 - cos^2 in float32.
        np.testing.assert_allclose(error, np.sum(X**2) * (1 - cosine**2), rtol=1e-5)

    def test_a_filter_of_zeros_has_codes_zero_a_positive_scale_and_finite_gradients(self):
        for threshold in ("twn", "quantile", "learned"):
            quantizer = built((3, 2), threshold=threshold, gradient="sigmoid", axis=-1)
            x = np.float32([[0, 1], [0, -2], [0, 3]])
            codes, scale = encode(quantizer, x)
            assert not codes[:, 0].any()
            assert scale[0] > 0
            gradient(lambda t, q=quantizer: ops.sum(q(t)), x, variables=quantizer.trainable_weights)


class TestGradient:
    def test_straight_through_is_one_everywhere(self):
        (to_x,) = gradient(lambda t: ops.sum(built()(t) * DQ), X)
        np.testing.assert_allclose(to_x, [1, 2, 3, 4, 5], rtol=1e-6)  # float32

    def test_the_sigmoids_factor_at_a_quarter_of_the_threshold(self):
        """tau = Delta / 4: r(Delta) = 1, r(0) = 8 g(4) = 0.1413, r(2 Delta) = 4 (g(4) + g(12)).

        That is 0.0707; the floor 0.1 lifts the last. Delta = 1: magnitudes sum to 10 / 0.7 over
        ten weights.
        """
        x = np.float32([0, 1, 2, -2, -1, 0, 0, 0, 0, 0])
        x[-1] = 10 / 0.7 - np.abs(x).sum()
        factors = [8 * sigmoid_slope(4), 1.0, 4 * (sigmoid_slope(4) + sigmoid_slope(12))]
        np.testing.assert_allclose(factors, [0.1413, 1, 0.0707], atol=5e-5)  # four digits by hand
        for floor, at_two in ((0.1, 0.1), (0.0, factors[2])):
            quantizer = built((10,), gradient="sigmoid", temperature=0.25, floor=floor)
            (to_x,) = gradient(lambda t, q=quantizer: ops.sum(q(t)), x)
            wanted = [factors[0], 1, at_two, at_two, 1]
            # Delta itself is a float32 mean times 0.7.
            np.testing.assert_allclose(to_x[:5], wanted, rtol=1e-4)

    def test_two_humps_that_merge_are_cut_at_one(self):
        """tau = Delta: 8 g(1) = 1.573 at 0."""
        assert 8 * sigmoid_slope(1) == pytest.approx(1.573, abs=1e-3)  # four digits by hand
        (to_x,) = gradient(lambda t: ops.sum(built(gradient="sigmoid")(t)), [0.0, *X[1:]])
        assert to_x[0] == pytest.approx(1, rel=1e-6)  # float32

    def test_the_temperature_is_a_variable(self):
        quantizer = built(gradient="sigmoid", temperature=1.0)
        quantizer.temperature.assign(0.25)
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), [0.0, *X[1:]])
        # Delta is a float32 mean times 0.7.
        assert to_x[0] == pytest.approx(8 * sigmoid_slope(4), rel=1e-4)

    def test_a_learned_scale_gets_the_codes_over_the_root_of_their_number(self):
        """dq = 1, 2, 3, 4, 5; codes 1, -1, 0, 0, 0: (1 - 2) / sqrt(5)."""
        quantizer = built(scale="learned")
        _, to_scale = gradient(lambda t: ops.sum(quantizer(t) * DQ), X, variables=[quantizer.scale])
        np.testing.assert_allclose(to_scale, -1 / np.sqrt(5), rtol=1e-5)  # float32

    def test_a_learned_threshold_feels_the_soft_projection(self):
        """Against finite differences of S(x), in units of 4 tau, over mean |x| and sqrt(N)."""
        quantizer = built(threshold="learned", temperature=1.0)
        _, got = gradient(lambda t: ops.sum(quantizer(t) * DQ), X, variables=[quantizer.ratio])
        x, mean = X.astype(float), 0.5
        delta = tau = 0.7 * mean

        def soft(ratio):
            edge = ratio * mean
            return 1 / (1 + np.exp(-(x - edge) / tau)) - 1 / (1 + np.exp(-(-x - edge) / tau))

        slope = (soft(0.7 + 1e-5) - soft(0.7 - 1e-5)) / 2e-5
        assert delta == pytest.approx(0.35)
        wanted = 4 * tau * np.sum(np.arange(1, 6) * slope) / np.sqrt(5)
        np.testing.assert_allclose(got, wanted, rtol=1e-4)  # as above


class TestAsKernels:
    def test_code_times_scale_gives_codes_and_scale_back_to_the_last_bit(self):
        random = np.random.default_rng(1)
        for threshold in ("twn", "quantile"):
            for count in (3, 9, 147, 1001):
                x = random.normal(size=(count, 7)).astype(np.float32)
                quantizer = built(x.shape, threshold=threshold, axis=-1)
                codes, scale = encode(quantizer, x)
                again = encode(quantizer, packed_kernels.latents(codes, scale, 2, quantizer))
                np.testing.assert_array_equal(again[0], codes)
                np.testing.assert_array_equal(again[1], scale)

    @pytest.mark.once
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 4}, r"codes -1, 0, 1 take 2 bits\. Got 4.*targets='activations'"),
            ({"threshold": "quantil"}, r"threshold must be one of .*Did you mean 'quantile'"),
            ({"scale": "lsq"}, r"scale must be one of .*'least_squares', 'learned'"),
            ({"gradient": "sigmoidal"}, r"gradient must be one of .*Did you mean 'sigmoid'"),
            ({"temperature": 0}, r"temperature must be a finite number, above 0\. Got 0"),
            ({"floor": 1.5}, r"floor must be a finite number, at least 0 and at most 1\. Got 1\.5"),
            ({"zeros": 1.0}, r"zeros must be a finite number, at least 0 and below 1\. Got 1\.0"),
            ({"role": "activation"}, r"role must be one of \('kernel',\)"),
        ],
    )
    def test_arguments_that_mean_nothing_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            Ternary(**options)

    def test_another_width_is_refused_later_too(self):
        quantizer = built()
        with pytest.raises(ValueError, match=r"take 2 bits\. Got 8"):
            quantizer.set_bits(8)
        assert quantizer.bits == 2
