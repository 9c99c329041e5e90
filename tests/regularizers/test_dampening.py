"""Oscillation dampening (Nagel et al. 2022, arXiv:2203.11086), by numbers worked by hand."""

import numpy as np
import pytest
from keras import ops

from keras_lowbit.quantizers import LSQ
from keras_lowbit.regularizers import Dampening
from tests.gradients import gradient

# Scale 0.5, 4 bits: codes -7..7, values -3.5..3.5.
W = (0.3, 0.6, -1.2, 3.6, -9.0, 1.0)  # -> 0.5, 0.5, -1, 3.5 (clipped), -3.5 (clipped), 1


def quantizer():
    made = LSQ(4)
    made.build((6,))
    made.scale.assign(0.5)
    return made


def test_the_penalty_by_hand():
    """0.2^2 + 0.1^2 + 0.2^2 = 0.09, times 3; clipped weights and those on the grid cost nothing."""
    penalty = Dampening(quantizer(), 3.0)(np.float32(W))
    # Differences w - q in float32.
    np.testing.assert_allclose(ops.convert_to_numpy(penalty), 0.27, rtol=1e-5)


def test_the_gradient_by_hand():
    """2 * 3 * (w - q) = 6 * (-0.2, 0.1, -0.2), none to clipped weights and none to the scale."""
    made = quantizer()
    to_w, to_scale = gradient(Dampening(made, 3.0), W, variables=[made.scale])
    np.testing.assert_allclose(to_w, [-1.2, 0.6, -1.2, 0, 0, 0], rtol=1e-5, atol=1e-6)  # as above
    assert to_scale == 0


def test_weights_at_the_very_end_of_the_grid_have_no_gradient():
    to_w, *_ = gradient(Dampening(quantizer(), 3.0), [3.5, -3.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(to_w, 0)


@pytest.mark.once
def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"Dampening: strength must be .* at least 0\. Got -1"):
        Dampening(quantizer(), -1)
