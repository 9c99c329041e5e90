"""DoReFa: Zhou et al. 2016, arXiv:1606.06160, by numbers worked by hand."""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.quantizers import DoReFa
from tests.gradients import gradient


def built(bits, shape, **options):
    quantizer = DoReFa(bits, **options)
    quantizer.build(shape)
    return quantizer


def encode(quantizer, x):
    codes, scale = quantizer.encode(ops.convert_to_tensor(np.float32(x)))
    return ops.convert_to_numpy(codes), ops.convert_to_numpy(scale)


class TestKernels:
    def test_codes_are_the_odd_numbers_of_the_paper(self):
        """2 bits, n = 3; tanh / max|tanh| = 1, 0.5, 0.1, -0.2, -1.

        3 (t / 2 + 1/2) = 3, 2.25, 1.65, 1.2, 0 -> 3, 2, 2, 1, 0; codes 2 j - 3.
        """
        x = np.arctanh(0.8 * np.array([1, 0.5, 0.1, -0.2, -1]))
        codes, scale = encode(built(2, (5,)), x)
        np.testing.assert_array_equal(codes, [3, 1, 1, -1, -3])
        assert scale == np.float32(1) / np.float32(3)

    def test_the_gradient_is_that_of_the_tanh_over_a_constant_maximum(self):
        """tanh = 0.8, -0.4: (1 - 0.64) / 0.8 = 0.45, (1 - 0.16) / 0.8 = 1.05, at any width."""
        x = np.arctanh([0.8, -0.4])
        for bits in (2, 4, 7):
            quantizer = built(bits, (2,))
            (to_x,) = gradient(lambda t, q=quantizer: ops.sum(q(t)), x)
            # Float32, through tanh and back.
            np.testing.assert_allclose(to_x, [0.45, 1.05], rtol=1e-5)

    def test_at_1_bit_they_are_signs_with_gradient_everywhere(self):
        quantizer = built(1, (2, 2))
        x = [[0.5, -4.0], [0.0, -1.5]]
        codes, scale = encode(quantizer, x)
        np.testing.assert_array_equal(codes, [[1, -1], [1, -1]])
        assert scale == 1.5  # 6 / 4: one scale for the tensor
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), x)
        np.testing.assert_allclose(to_x, np.ones((2, 2)), rtol=1e-6)  # float32

    @pytest.mark.parametrize("bits", [2, 3, 7])
    def test_the_ends_are_reached_and_zero_is_not(self, bits):
        x = np.random.default_rng(0).normal(size=(40, 25))
        quantizer = built(bits, x.shape)
        codes, _ = encode(quantizer, x)
        n = 2**bits - 1
        assert quantizer.static_bounds() == (-n, n)
        assert np.abs(codes).max() == n
        assert (codes % 2 == 1).all()

    def test_a_kernel_of_zeros_has_finite_codes_and_gradients(self):
        quantizer = built(2, (2,))
        codes, _ = encode(quantizer, [0.0, 0.0])
        assert np.abs(codes).max() == 1
        gradient(lambda t: ops.sum(quantizer(t)), [0.0, 0.0])

    def test_8_bits_do_not_fit_int8(self):
        with pytest.raises(ValueError, match=r"1 to 7 bits.*Got 8"):
            DoReFa(8)
        quantizer = built(4, (2,))
        with pytest.raises(ValueError, match=r"1 to 7 bits.*Got 8"):
            quantizer.set_bits(8)
        assert quantizer.bits == 4
        assert DoReFa(8, role="activation").bits == 8


class TestActivations:
    def unsigned(self, **options):
        return built(2, (None, 6), role="activation", signed=False, **options)

    x = (-0.5, 0.0, 0.4, 0.6, 1.0, 1.5)

    def test_codes_of_the_unit_clip(self):
        codes, scale = encode(self.unsigned(clip=1.0), [self.x])
        np.testing.assert_array_equal(codes, [[0, 0, 1, 2, 3, 3]])  # 1.2, 1.8
        assert scale == np.float32(1) / np.float32(3)

    def test_the_gradient_passes_inside_the_clip(self):
        quantizer = self.unsigned(clip=1.0)
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), [self.x])
        np.testing.assert_allclose(to_x, [[0, 1, 1, 1, 1, 0]], rtol=1e-6)  # float32

    def test_signed_ones_clip_both_ends(self):
        quantizer = built(3, (None, 4), role="activation", clip=3.0)  # codes -3..3
        x = [[-9.0, -3.0, 1.2, 3.1]]
        np.testing.assert_array_equal(encode(quantizer, x)[0], [[-3, -3, 1, 3]])
        (to_x,) = gradient(lambda t: ops.sum(quantizer(t)), x)
        np.testing.assert_allclose(to_x, [[0, 1, 1, 0]], rtol=1e-6)  # float32

    def test_a_given_clip_stays_and_others_come_from_data(self):
        given, free = self.unsigned(clip=2.0), self.unsigned()
        assert free.grid().scale == np.float32(1) / np.float32(3)
        for quantizer in (given, free):
            quantizer.fit_scale(np.float32([0.0, 6.0]), "minmax")
            assert float(ops.convert_to_numpy(quantizer.calibrated)) == 1
        assert given.grid().scale == np.float32(2) / np.float32(3)
        assert free.grid().scale == 2.0

    def test_the_clip_stays_when_the_bits_change(self):
        quantizer = self.unsigned(clip=1.0)
        quantizer.set_bits(8)
        assert quantizer.grid().scale == np.float32(1) / np.float32(255)

    def test_a_clip_is_positive(self):
        with pytest.raises(ValueError, match="clip must be a finite number, above 0"):
            DoReFa(4, role="activation", clip=0.0)
