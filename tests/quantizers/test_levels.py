"""Learned levels by numbers worked by hand (a reconstruction of arXiv:2012.13762)."""

import statistics

import numpy as np
import pytest
from keras import ops

from keras_lowbit.numerics import uniform
from keras_lowbit.quantizers import Levels
from keras_lowbit.quantizers.lloyd import gaussian_shares, levels_of
from tests.gradients import compiled, gradient


def built(levels, shape, **options):
    """A quantizer whose levels are given: (K,) or (K, filters)."""
    levels = np.asarray(levels, float)
    quantizer = Levels(int(np.log2(len(levels))), **options)
    quantizer.build(shape)
    quantizer.mode.start(quantizer, None, levels, False)
    return quantizer


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def values(quantizer, x):
    return numpy(quantizer(ops.convert_to_tensor(np.float32(x))))


LEVELS = (-1.0, -0.2, 0.3, 1.5)  # thresholds -0.6, 0.05, 0.9; clip mask -1.4..2.1
X = np.float32([-5.0, -1.4, -0.61, -0.59, 0.04, 0.06, 0.8, 1.0, 2.0, 2.2])
NEAREST = (-1, -1, -1, -0.2, -0.2, 0.3, 0.3, 1.5, 1.5, 1.5)


class TestForward:
    def test_each_weight_takes_the_nearest_level(self):
        # Levels pass through softplus and a division by 127 / max: float32 roundings.
        np.testing.assert_allclose(values(built(LEVELS, X.shape), X), NEAREST, rtol=1e-6)

    def test_each_filter_has_levels_of_its_own_if_asked(self):
        x = np.stack([X, X * 2], axis=-1)
        both = built(np.stack([LEVELS, LEVELS], -1) * [1, 2], x.shape, per_filter=True, axis=-1)
        # As above, and times 2.
        np.testing.assert_allclose(values(both, x)[:, 1], np.multiply(NEAREST, 2), rtol=1e-5)
        one = built(LEVELS, x.shape, axis=-1)
        assert one.levels().shape == (4,)

    def test_two_levels_around_zero_are_the_binary_quantizer(self):
        x = np.float32([0.5, -0.25, 1.0, -1.25])
        signs, scale = uniform.signs(ops.convert_to_tensor(x), (0,))
        made = values(built([-0.75, 0.75], x.shape), x)
        np.testing.assert_allclose(made, numpy(signs * scale), rtol=1e-6)  # float32

    def test_the_order_of_weights_does_not_matter(self):
        x = np.random.default_rng(0).normal(size=99).astype(np.float32)
        order = np.random.default_rng(1).permutation(99)
        fitted = Levels(3), Levels(3)
        for quantizer, given in zip(fitted, (x, x[order]), strict=True):
            quantizer.build(x.shape)
            quantizer.fit_scale(given)
        np.testing.assert_array_equal(values(fitted[0], x)[order], values(fitted[1], x[order]))

    def test_compiled_values_are_the_eager_ones(self):
        x = np.random.default_rng(0).normal(size=(31, 5)).astype(np.float32)
        quantizer = Levels(3)
        quantizer.build(x.shape)
        quantizer.fit_scale(x)
        # Levels are sums of softplus, each rounded: a level near 0 keeps the others' last bits.
        np.testing.assert_allclose(compiled(quantizer)(x), values(quantizer, x), atol=1e-6)


class TestGradient:
    def test_a_level_feels_every_weight_that_uses_it(self):
        """dq = 1..10 over levels of 3, 2, 2, 3 weights: 6, 9, 13, 27, over sqrt(10 * 1).

        v_1 moves all levels; gap k moves those above it, by softplus' = 1 - e^(-gap / width).
        """
        quantizer = built(LEVELS, X.shape)
        dq = ops.convert_to_tensor(np.arange(1, 11, dtype=np.float32))
        _, to_lowest, to_gaps = gradient(
            lambda t: ops.sum(quantizer(t) * dq), X, variables=[quantizer.lowest, quantizer.gaps]
        )
        to_levels = np.array([6, 9, 13, 27]) / np.sqrt(10)
        gaps = np.diff(LEVELS)
        slopes = 1 - np.exp(-gaps / gaps.mean())
        np.testing.assert_allclose(to_lowest, to_levels.sum(), rtol=1e-5)  # float32 sums
        above = np.cumsum(to_levels[::-1])[::-1][1:]
        np.testing.assert_allclose(to_gaps, above * slopes, rtol=1e-4)  # float32, through softplus

    def test_at_3_bits_the_damping_counts_codes_too(self):
        """Twelve weights that share eight levels, dq = 1: 12 / sqrt(12 * 3) = 2."""
        x = np.linspace(-4, 3, 12)
        quantizer = built(np.arange(-4.0, 4.0), x.shape)
        _, to_lowest = gradient(lambda t: ops.sum(quantizer(t)), x, variables=[quantizer.lowest])
        np.testing.assert_allclose(to_lowest, 2.0, rtol=1e-5)  # a float32 sum of twelve

    def test_it_is_exact_against_finite_differences(self):
        """Loss sum (q - y)^2 by a level; no threshold is crossed within the step."""
        y = np.linspace(-2, 2, 10)
        quantizer = built(LEVELS, X.shape)
        target = ops.convert_to_tensor(np.float32(y))
        _, to_lowest = gradient(
            lambda t: ops.sum((quantizer(t) - target) ** 2), X, variables=[quantizer.lowest]
        )

        def loss(shift):
            return np.sum((np.array(NEAREST) + shift - y) ** 2)

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        np.testing.assert_allclose(to_lowest, slope / np.sqrt(10), rtol=1e-5)  # float32 sums

    def test_weights_far_outside_get_none(self):
        quantizer = built(LEVELS, X.shape)
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), X)
        wanted = np.ones(10)
        wanted[[0, -1]] = 0  # the mask reaches from -1.4 to 2.1
        inside = np.ones(10, bool)
        inside[1] = False  # on its edge, to a float32 rounding
        np.testing.assert_allclose(to_x[inside], wanted[inside], rtol=1e-6)  # float32

    def test_levels_stay_sorted_under_any_gradient(self):
        quantizer = built(LEVELS, X.shape)
        random = np.random.default_rng(0)
        for size in (0.1, 10, 1e4):
            quantizer.gaps.assign(random.normal(size=3).astype(np.float32) * size)
            quantizer.lowest.assign(float(random.normal() * size))
            levels = numpy(quantizer.levels())
            assert (np.diff(levels) >= 0).all()
            assert np.isfinite(levels).all()


class TestStart:
    def test_lloyd_finds_the_means_of_clusters(self):
        x = np.array([-1.1, -0.9, -0.1, 0.0, 0.1, 0.9, 1.0, 1.1, 3.0, 3.0])
        np.testing.assert_allclose(levels_of(x, 4), [-1, 0, 1, 3], atol=1e-12)  # float64

    def test_gaussian_data_get_the_known_best_levels(self):
        """Max 1960: four levels of a unit Gaussian at 0.4528 and 1.510."""
        phi = statistics.NormalDist()
        x = np.array([phi.inv_cdf((i + 0.5) / 20_001) for i in range(20_001)])
        # Twenty iterations from quantiles; 1 % is what they leave.
        np.testing.assert_allclose(levels_of(x, 4), [-1.510, -0.4528, 0.4528, 1.510], rtol=0.01)
        shares = gaussian_shares(4)
        np.testing.assert_allclose(shares + shares[::-1], 1)

    @pytest.mark.parametrize("x", [np.zeros(9), np.ones(5), np.array([-2.0, 2.0])])
    def test_few_values_get_evenly_spaced_levels(self, x):
        levels = levels_of(x, 8)
        assert (np.diff(levels) > 0).all()
        assert np.abs(x[:, None] - levels).min(axis=1).max() <= 2 / 7

    def test_the_uniform_start_covers_the_kernel(self):
        quantizer = Levels(2, init="uniform")
        quantizer.build((3,))
        quantizer.fit_scale(np.float32([0.5, -3.0, 1.0]))
        # Float32, through softplus.
        np.testing.assert_allclose(numpy(quantizer.levels()), [-3, -1, 1, 3], rtol=1e-5)


class TestSnap:
    def test_levels_land_on_whole_codes_within_half_a_step(self):
        """s = 1.5 / 127: -1 / s = -84.67, -0.2 / s = -16.93, 0.3 / s = 25.4."""
        quantizer = built(LEVELS, X.shape)
        quantizer.snap()
        codes, scale = quantizer.encode(ops.convert_to_tensor(X))
        assert numpy(scale) == np.float32(1.5) / np.float32(127)
        assert sorted(set(numpy(codes).tolist())) == [-85, -17, 25, 127]
        np.testing.assert_array_equal(quantizer.code_table(), [-85, -17, 25, 127])
        assert np.abs(numpy(codes * scale) - NEAREST).max() <= 0.5 * 1.5 / 127 + 1e-6

    def test_snapped_levels_rest_whatever_their_variables_do(self):
        quantizer = built(LEVELS, X.shape)
        quantizer.snap()
        before = values(quantizer, X)
        grads = gradient(
            lambda t: ops.sum(quantizer(t) ** 2), X, variables=[quantizer.lowest, quantizer.gaps]
        )
        assert not grads[1].any()
        assert not grads[2].any()
        assert grads[0][2:-1].all()
        quantizer.lowest.assign(-7.0)
        np.testing.assert_array_equal(values(quantizer, X), before)

    def test_a_fit_takes_the_snap_back(self):
        quantizer = built(LEVELS, X.shape)
        quantizer.snap()
        quantizer.fit_scale(X)
        assert not quantizer.is_snapped
        with pytest.raises(ValueError, match=r"levels are reals.*snap_levels\(model\)"):
            _ = quantizer.code_width


@pytest.mark.once
class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 0}, r"two at least\): bits must be a whole number"),
            ({"bits": 9}, "Levels: bits must be from 1 to 8. Got 9"),
            ({"mode": "code-book"}, "mode must be one of .*Did you mean 'codebook'"),
            ({"init": "loyd"}, "init must be one of .*Did you mean 'lloyd'"),
            ({"role": "activation"}, r"role must be one of \('kernel',\)"),
        ],
    )
    def test_what_means_nothing_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            Levels(**options)

    def test_the_number_of_levels_stays(self):
        quantizer = built(LEVELS, X.shape)
        with pytest.raises(ValueError, match=r"4 levels are variables and stay as many"):
            quantizer.set_bits(3)
