"""Learned levels chosen by signs over a basis and by logits, worked by hand.

Before a snap levels are reals, held as multiples of `max / 127`: values come back with float32
roundings (1e-6), gradients with a few more from the damping and the division (1e-5). Codes, which
exist after a snap, are compared exactly.
"""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.quantizers import Levels
from tests.gradients import compiled, gradient


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def values(quantizer, x):
    return numpy(quantizer(ops.convert_to_tensor(np.float32(x))))


def built(mode, shape, bits=2, **options):
    quantizer = Levels(bits, mode=mode, **options)
    quantizer.build(shape)
    return quantizer


def fitted(mode, x, bits=2, **options):
    quantizer = built(mode, x.shape, bits, **options)
    quantizer.fit_scale(x)
    return quantizer


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def by_hand():
    """Basis 0.5 and 1; signs ++, -+, +-, --; the last weight's second latent is past 1."""
    quantizer = built("basis", (4,))
    quantizer.basis.assign([0.5, 1.0])
    quantizer.latents.assign([[0.5, -0.5, 0.0, -0.1], [0.5, 0.1, -1.0, -1.5]])
    return quantizer


class TestBasis:
    def test_a_weight_is_the_sum_of_its_signed_basis(self):
        made = values(by_hand(), np.zeros(4))
        np.testing.assert_allclose(made, [1.5, 0.5, -0.5, -1.5], rtol=1e-6)  # float32

    def test_gradients(self):
        """dq = 1, 2, 3, 4, over sqrt(4 * 1) for the basis; the STE of a sign ends at 1."""
        quantizer = by_hand()
        dq = ops.convert_to_tensor(np.float32([1, 2, 3, 4]))
        to_x, to_basis, to_latents = gradient(
            lambda t: ops.sum(quantizer(t) * dq),
            np.zeros(4),
            variables=[quantizer.basis, quantizer.latents],
        )
        np.testing.assert_array_equal(to_x, 0)
        # 1 - 2 + 3 - 4 and 1 + 2 - 3 - 4
        np.testing.assert_allclose(to_basis, [-1.0, -2.0], rtol=1e-5)
        # Float32 sums.
        np.testing.assert_allclose(to_latents, [[0.5, 1, 1.5, 2], [1, 2, 3, 0]], rtol=1e-5)

    def test_the_basis_gradient_is_exact_against_finite_differences(self):
        quantizer, y = by_hand(), np.array([1.0, -1.0, 0.3, 0.7])
        _, to_basis = gradient(
            lambda t: ops.sum((quantizer(t) - ops.convert_to_tensor(np.float32(y))) ** 2),
            np.zeros(4),
            variables=[quantizer.basis],
        )
        signs = np.array([[1, -1, 1, -1], [1, 1, -1, -1]])

        def loss(basis):
            return np.sum((basis @ signs - y) ** 2)

        basis = np.array([0.5, 1.0])
        slope = [(loss(basis + d) - loss(basis - d)) / 2e-4 for d in 1e-4 * np.eye(2)]
        # A quadratic loss: central differences are exact, to float32 in the gradient.
        np.testing.assert_allclose(to_basis, np.array(slope) / 2, rtol=1e-4)

    def test_a_kernel_that_is_such_a_sum_is_found(self):
        signs = np.random.default_rng(1).choice([-1.0, 1.0], (3, 200))
        x = np.array([0.1, 0.25, 0.6]) @ signs
        quantizer = fitted("basis", x, bits=3)
        np.testing.assert_allclose(np.sort(numpy(quantizer.basis)), [0.1, 0.25, 0.6], 1e-4)
        # Three basis values in float32 that partly cancel in the smallest level.
        np.testing.assert_allclose(values(quantizer, x), x, rtol=1e-4)

    def test_fitting_beats_the_even_start_for_each_filter(self):
        x = normal(20000, 3) * np.float32([0.1, 1.0, 30.0])
        errors = []
        for init in ("uniform", "lloyd"):
            quantizer = fitted("basis", x, init=init, per_filter=True, axis=-1)
            errors.append(np.mean((values(quantizer, x) - x) ** 2, axis=0))
        assert (errors[1] < 0.8 * errors[0]).all()
        # The best four levels of a Gaussian, which lie evenly enough to be such sums: 0.1175;
        # a sample of 20,000 misses that by about 1 %.
        np.testing.assert_allclose(errors[1] / x.var(axis=0), 0.1175, rtol=0.03)

    def test_a_kernel_of_zeros_stays_finite(self):
        quantizer = fitted("basis", np.zeros(5))
        assert np.abs(values(quantizer, np.zeros(5))).max() < 1e-4

    def test_before_a_fit_levels_are_even(self):
        levels = np.sort(numpy(built("basis", (1,), bits=3).levels()))
        np.testing.assert_allclose(levels, np.linspace(-1, 1, 8), atol=1e-6)  # float32


class TestSelector:
    def test_a_weight_takes_the_level_of_its_largest_logit_and_gradients_are_soft(self):
        """Levels -1 and 1, logits 0 and ln 3: shares 1/4 and 3/4, mean 1/2.

        dq = 2: to the logits 2/4 (-1 - 1/2) and 2 * 3/4 (1 - 1/2). At the temperature 2 the shares
        are 1 : sqrt(3).
        """
        quantizer = built("selector", (1,), bits=1)
        quantizer.logits.assign([[0.0], [np.log(3.0)]])

        def to_logits():
            return gradient(
                lambda t: 2.0 * ops.sum(quantizer(t)), [5.0], variables=[quantizer.logits]
            )

        np.testing.assert_allclose(values(quantizer, [5.0]), [1.0], rtol=1e-6)  # float32 sums
        to_x, found = to_logits()
        np.testing.assert_array_equal(to_x, 0)
        np.testing.assert_allclose(found.ravel(), [-0.75, 0.75], rtol=1e-5)  # float32
        quantizer.temperature.assign(2.0)
        share = 1 / (1 + np.sqrt(3))
        # Float32, through softmax.
        np.testing.assert_allclose(
            to_logits()[1].ravel(), [-2 * share * (1 - share), 2 * share * (1 - share)], rtol=1e-5
        )

    def test_of_equal_logits_the_first_wins(self):
        quantizer = built("selector", (3,), bits=1)
        np.testing.assert_allclose(values(quantizer, np.zeros(3)), -1.0, rtol=1e-6)  # float32

    @pytest.mark.parametrize("per_filter", [False, True])
    def test_it_starts_where_the_codebook_does(self, per_filter):
        x = normal(40, 3)
        options = {"per_filter": per_filter, "axis": -1}
        np.testing.assert_array_equal(
            values(fitted("selector", x, **options), x), values(fitted("codebook", x, **options), x)
        )


@pytest.mark.parametrize("mode", ["basis", "selector"])
class TestBoth:
    def test_compiled_values_are_the_eager_ones(self, mode):
        x = normal(31, 5)
        quantizer = fitted(mode, x)
        # Levels are float32 sums.
        np.testing.assert_allclose(compiled(quantizer)(x), values(quantizer, x), atol=1e-6)

    def test_what_the_float_kernel_does_no_longer_matters(self, mode):
        x = normal(31, 5)
        quantizer = fitted(mode, x)
        np.testing.assert_array_equal(values(quantizer, -x), values(quantizer, x))

    def test_snapped_levels_are_whole_codes_near_the_learned_ones(self, mode):
        x = normal(300)
        quantizer = fitted(mode, x)
        before = values(quantizer, x)
        quantizer.snap()
        codes, scale = (numpy(t) for t in quantizer.encode(ops.convert_to_tensor(x)))
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert np.abs(codes).max() == 127
        assert set(codes) <= set(quantizer.code_table())
        assert (np.diff(quantizer.code_table()) >= 0).all()
        # Half a step of the int8 grid, and float32.
        np.testing.assert_allclose(codes * scale, before, atol=scale / 2 * 1.001)


@pytest.mark.once
def test_a_selector_of_many_levels_is_refused():
    with pytest.raises(ValueError, match=r"bits 1 or 2\. Got 3; take mode='codebook' or 'basis'"):
        Levels(3, mode="selector")
