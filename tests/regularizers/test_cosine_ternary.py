"""The cosine-to-ternary penalty by numbers worked by hand (a reconstruction, arXiv:2212.12649)."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.regularizers import CosineTernaryRegularizer
from tests.gradients import gradient


def value(regularizer, w):
    return float(ops.convert_to_numpy(regularizer(ops.convert_to_tensor(np.float32(w)))))


def test_one_filter_by_hand():
    """w = 3, 4, 0: mean 7/3, Delta 1.633, T = 1, 1, 0: cos = 7 / (5 sqrt 2) = 0.98995."""
    wanted = 2 * (1 - 7 / (5 * np.sqrt(2)))
    # 1 - 0.99 in float32.
    assert value(CosineTernaryRegularizer(2.0), [[3], [4], [0]]) == pytest.approx(wanted, rel=1e-4)


def test_filters_are_averaged_and_ternary_ones_cost_nothing():
    w = [[3, -2, 0], [4, 0, 0], [0, 2, 0]]
    one = 1 - 7 / (5 * np.sqrt(2))
    assert value(CosineTernaryRegularizer(), w) == pytest.approx(one / 3, rel=1e-4)  # as above
    # All nine weights as one filter: mean 11/9, T keeps 3, -2, 4, 2: 11 / sqrt(33 * 4).
    assert value(CosineTernaryRegularizer(axis=None), w) == pytest.approx(
        1 - 11 / np.sqrt(132), rel=1e-4
    )


def test_it_does_not_feel_magnitudes():
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 7))
    once, hundredfold = (value(CosineTernaryRegularizer(), k * w) for k in (1, 100))
    assert once == pytest.approx(hundredfold, rel=1e-5)  # float32 sums


def test_its_gradient_is_orthogonal_to_each_filter_and_descends():
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    regularizer = CosineTernaryRegularizer(10.0)
    (to_w,) = gradient(regularizer, w)
    along = (to_w * w).sum((0, 1, 2))
    size = np.sqrt((to_w**2).sum((0, 1, 2)) * (w**2).sum((0, 1, 2)))
    assert (size > 1e-2).all()
    # Cancelling float32 sums of 45 terms.
    assert np.abs(along / size).max() < 1e-5
    assert value(regularizer, w - 0.1 * to_w) < value(regularizer, w)


def test_its_gradient_is_that_of_finite_differences():
    """T stays the same within the step, so R is smooth there."""
    w = np.array([[3.0], [4], [0.1]])
    (to_w,) = gradient(CosineTernaryRegularizer(), w)

    def exact(w):
        return 1 - (w[0] + w[1]) / (np.sqrt((w**2).sum()) * np.sqrt(2))

    for i in range(3):
        step = np.zeros((3, 1))
        step[i] = 1e-6
        wanted = (exact(w + step) - exact(w - step))[0] / 2e-6
        # Float32 against float64.
        np.testing.assert_allclose(to_w[i, 0], wanted, rtol=1e-4, atol=1e-7)


def test_a_filter_of_zeros_costs_nothing_and_has_no_gradient():
    (to_w,) = gradient(CosineTernaryRegularizer(), [[0, 1], [0, 3]])
    assert not to_w[:, 0].any()
    assert value(CosineTernaryRegularizer(), np.zeros((2, 2))) == 0


def test_it_is_a_keras_regularizer_that_saves(tmp_path):
    given = CosineTernaryRegularizer(0.25, axis=(-2, -1), threshold=0.75)
    again = keras.regularizers.get(keras.saving.serialize_keras_object(given))
    assert again.get_config() == {"strength": 0.25, "axis": [-2, -1], "threshold": 0.75}
    inputs = keras.Input((3,))
    layer = keras.layers.Dense(2, kernel_regularizer=CosineTernaryRegularizer(0.5))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    (loss,) = loaded.losses
    # Float32.
    assert float(ops.convert_to_numpy(loss)) == pytest.approx(
        value(CosineTernaryRegularizer(0.5), ops.convert_to_numpy(layer.kernel)), rel=1e-6
    )


@pytest.mark.once
@pytest.mark.parametrize("options", [{"strength": -1.0}, {"threshold": 0.0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        CosineTernaryRegularizer(**options)
