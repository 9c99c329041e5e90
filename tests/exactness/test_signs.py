"""Random models of binary activations: reference, runtime and Keras agree in every code."""

import keras
import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

from keras_lowbit import Scheme
from tests.exactness.hostile import constant_tensors, exported, hostile, quantized
from tests.exactness.random_models import Maker

pytestmark = pytest.mark.runtime

K = keras.layers
SEEDS = range(2 if keras.backend.backend() == "jax" else 6)
MANY = 60


# Blocks with a ReLU or a gate of their own, and zeros put in front of a sign.
LEFT_OUT = ("norm_first", "shared", "padding", "padded_conv", "excited", "gated", "multiplied")


class WithoutReLU(Maker):
    """Random models whose tensors have both signs, and whose convolutions pad."""

    def __init__(self, seed):
        super().__init__(seed, None)
        self.blocks = tuple(b for b in self.blocks if b.__name__ not in LEFT_OUT)

    def activation(self, x):
        return x

    def finish_with(self, layer, x, *args, **fields):
        return self.finish(layer(*args, **fields)(x))


def assert_exact(seed):
    random = np.random.default_rng(seed + 20_000)
    keras.utils.clear_session(free_memory=False)
    model = hostile(WithoutReLU(seed).model(), seed, gain=1.5)
    scheme = Scheme(int(random.choice([1, 2, 4])), 1, binary_activation="sign")
    weights = str(random.choice(["int8", "int4"]))
    result, codes = exported(quantized(model, scheme, seed), weights, seed=seed)
    assert result.mismatches == 0, f"seed {seed}, {scheme}, {weights}:\n{result}"
    bits = [tensor.bits for tensor in result.graph.tensors.values()]
    return bits.count(1), len(constant_tensors(result, codes)), len(bits)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_code_of_a_model_of_signs_differs(seed):
    assert_exact(seed)


@pytest.mark.slow
def test_no_code_of_sixty_models_of_signs_differs():
    found = np.array([assert_exact(seed) for seed in range(100, 100 + MANY)])
    signs, constant, tensors = found.sum(0)
    assert signs > 2 * MANY
    assert constant < tensors / 5  # the sign of a mean of a few places rarely changes
