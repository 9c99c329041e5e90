"""The same files in the aarch64 runtime: no code differs from x86 (`make test-arm`)."""

import keras
import numpy as np
import pytest

from keras_lowbit import zoo
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from keras_lowbit.numerics.fixed_point import settled_scale
from tests.exactness import arm
from tests.exactness.coverage import Coverage
from tests.exactness.hostile import exported, hostile, quantized
from tests.exactness.random_models import random_model, random_options
from tests.tflite_export.graphs import Builder
from tflite_export import flatbuffer, runtime

pytestmark = [
    pytest.mark.arm,
    pytest.mark.runtime,
    pytest.mark.skipif(bool(arm.available()), reason=arm.available() or "ready"),
]


def differing(results, folder):
    """Wrong codes by file and tensor, and how many were compared, over every tensor."""
    jobs = []
    for result, images in results:
        feeds = dict(zip(result.graph.inputs, images, strict=True))
        jobs += [(content, feeds) for content in _copies(result)]
    wrong, compared = {}, 0
    for i, ((content, feeds), there) in enumerate(zip(jobs, arm.run(jobs, folder), strict=True)):
        here = runtime.run(content, feeds)
        assert set(here) == set(there)
        for name, codes in here.items():
            compared += codes.size
            if not np.array_equal(codes, there[name]):
                wrong[i // 2, name] = int(np.count_nonzero(codes != there[name]))
    return wrong, compared


def _copies(result):
    return result.content, flatbuffer.with_all_outputs(result.content)


def mobilenet():
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=10)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("build", [lambda: zoo.build("resnet8"), mobilenet], ids=["resnet8", "v2"])
def test_hostile_models_give_the_codes_of_x86(build, weights, tmp_path, capsys):
    small = quantized(hostile(build(), 1), "w4a4")
    result = exported(small, weights, images=2)
    assert result[0].mismatches == 0
    wrong, compared = differing([result], tmp_path)
    with capsys.disabled():
        print(f"\n{small.name} {weights}: {sum(wrong.values())} wrong of {compared:,} codes")
    assert compared > 10_000
    assert wrong == {}


def test_random_models_give_the_codes_of_x86(tmp_path, capsys):
    coverage, results = Coverage(), []
    for seed in range(12):
        scheme, weights, options = random_options(seed, coverage)
        small = quantized(random_model(seed, coverage), scheme, seed)
        weights = "int8" if weights == "int4_all" else weights
        results.append(exported(small, weights, seed=seed, **options))
    wrong, compared = differing(results, tmp_path)
    with capsys.disabled():
        print(f"\n12 random models: {sum(wrong.values())} wrong of {compared:,} codes")
    assert wrong == {}


def test_products_of_two_tensors_on_settled_scales_are_those_of_the_reference(tmp_path):
    """All pairs of codes, ties of powers of two among them; without the settling many differ."""
    every = np.arange(-128, 128, dtype=np.int8)
    pairs = {"x": every[None, :, None], "y": np.tile(every, (1, 256, 1))}
    wrong = {True: 0, False: 0}
    for settled in wrong:
        graphs = []
        for unit in (2.0**-14, 2.0**-8, 2.0**-5, 0.9 / 256, 1 / 255, 1.0, 3.0, *_units(20)):
            b = Builder()
            x = b.input(1, 256, 1, scale=0.11, zero_point=-128)
            y = b.input(1, 256, 256, name="y", scale=0.07, zero_point=5)
            scale = 0.11 * 0.07 / unit
            scale = settled_scale(0.11, 0.07, scale) if settled else scale
            made = b.op(ir.Multiply, x, y, shape=(1, 256, 256), scale=scale)
            graphs.append((b.graph(made), made))
        jobs = [(flatbuffer.write(graph), pairs) for graph, _ in graphs]
        for (graph, made), there in zip(graphs, arm.run(jobs, tmp_path), strict=True):
            wrong[settled] += np.count_nonzero(there[made] != reference.run(graph, pairs)[made])
    assert wrong[True] == 0
    assert wrong[False] > 1000


def _units(count):
    return np.random.default_rng(0).uniform(2.0**-10, 0.1, count).tolist()


def test_the_logistic_of_every_code_is_that_of_the_reference(tmp_path):
    """A table of floats: another mathematical library might round one of them otherwise."""
    every = np.arange(-128, 128, dtype=np.int8)[None]
    graphs = []
    for scale in np.geomspace(1e-3, 1.0, 40):
        b = Builder()
        x = b.input(1, 256, scale=float(scale), zero_point=-7)
        y = b.op(ir.Logistic, x, shape=(1, 256), scale=1 / 256, zero_point=-128)
        graphs.append((b.graph(y), x, y))
    jobs = [(flatbuffer.write(graph), {x: every}) for graph, x, _ in graphs]
    for (graph, x, y), there in zip(graphs, arm.run(jobs, tmp_path), strict=True):
        np.testing.assert_array_equal(there[y], reference.run(graph, {x: every})[y])
