"""Random models through the whole path: reference, runtime and Keras agree in every code."""

import keras
import pytest

pytest.importorskip("ai_edge_litert")

from keras_lowbit import NotExportable
from tests.exactness.coverage import Coverage
from tests.exactness.hostile import constant_tensors, exported, quantized
from tests.exactness.random_models import random_model, random_options
from tflite_export.verify import KERAS

pytestmark = pytest.mark.runtime

# JAX compiles every layer of every model; fewer of them say as much there.
QUICK = range(3 if keras.backend.backend() == "jax" else 12)
MANY = 200
FIRST = 1000


def assert_exact(seed, coverage):
    scheme, weights, options = random_options(seed, coverage)
    small = quantized(random_model(seed, coverage), scheme, seed)
    result, codes = exported(small, weights, seed=seed, **options)
    counts = result.verification.by_comparison
    # int4 kernels of k x k and depthwise run in built-in kernels, which round otherwise.
    wrong = counts[KERAS].wrong if weights == "int4_all" else result.mismatches
    assert wrong == 0, f"seed {seed}, {scheme}, {weights}, {options}:\n{result}"
    assert counts[KERAS].compared > 0
    return len(constant_tensors(result, codes)), len(result.graph.ops)


@pytest.mark.parametrize("seed", QUICK)
def test_no_code_of_a_random_model_differs(seed):
    assert_exact(seed, Coverage())


@pytest.mark.slow
def test_no_code_of_two_hundred_random_models_differs(capsys):
    coverage, refused, constant, tensors, verified = Coverage(), {}, 0, 0, []
    for seed in range(FIRST, FIRST + MANY + MANY // 10):
        counted = Coverage()
        try:
            found, among = assert_exact(seed, counted)
        except NotExportable as objection:
            # The one thing that random weights cannot help: a sum that nearly vanishes.
            assert "the runtime adds exactly for ratios in" in str(objection), seed  # noqa: PT017
            refused[seed] = str(objection)
            continue
        verified.append(seed)
        constant, tensors = constant + found, tensors + among
        coverage.update(counted)
        if len(verified) == MANY:
            break
    with capsys.disabled():
        print(f"\nseeds {verified[0]}..{verified[-1]}, refused {list(refused)}")
        print(f"{tensors} tensors, {constant} of them constant\n{coverage}")
    assert len(verified) == MANY
    assert coverage.missing(5) == {}
    assert constant < tensors / 20


@pytest.mark.once
def test_a_seed_makes_the_same_model_again():
    first, second, third = (random_model(seed) for seed in (3, 3, 4))
    assert [w.tolist() for w in first.get_weights()] == [w.tolist() for w in second.get_weights()]
    assert [x.name for x in first.layers] == [x.name for x in second.layers]
    assert [x.name for x in first.layers] != [x.name for x in third.layers]
