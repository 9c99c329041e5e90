"""Known architectures with hostile batch norms: reference, runtime and Keras agree."""

import keras
import numpy as np
import pytest

from keras_lowbit import zoo
from tests.exactness.hostile import SCHEMES, WEIGHTS, constant_tensors, exported, hostile, quantized

pytest.importorskip("ai_edge_litert")

pytestmark = pytest.mark.runtime


def application(name):
    make = getattr(keras.applications, name)
    return lambda: make(weights=None, input_shape=(96, 96, 3))


BUILD = {
    "resnet8": lambda: zoo.build("resnet8"),
    "resnet20": lambda: zoo.build("resnet20"),
    "MobileNet": application("MobileNet"),
    "MobileNetV2": application("MobileNetV2"),
    "ResNet50": application("ResNet50"),
}
# Hostile weights shut most of their gates at few bits: nothing is said of how many tensors vary.
GATED = {
    "MobileNetV3Small": application("MobileNetV3Small"),
    "EfficientNetB0": application("EfficientNetB0"),
    "mnasnet_a1": lambda: zoo.build("mnasnet_a1", input_shape=(96, 96, 3)),
}

# 53 batch norms one after the other, and nothing that bounds their product.
GAIN = {"ResNet50": 1.5}


def check(name, scheme, weights=WEIGHTS, images=2):
    small = quantized(hostile(BUILD[name](), 1, GAIN.get(name, np.inf)), scheme)
    for storage in weights:
        result, codes = exported(small, storage, images=images)
        counts = result.verification.by_comparison
        assert len(counts) == 3
        assert result.mismatches == 0, f"{name} {scheme} {storage}: {result.verification}"
        # A tensor of one code is exact whatever computes it.
        assert len(constant_tensors(result, codes)) <= len(result.graph.ops) / 20
        kernels = {row["kernels"] for row in result.report["ops"] if row["op"] != "softmax"}
        assert kernels == {"XNNPACK"}


@pytest.mark.parametrize(
    ("name", "scheme", "weights"),
    [("resnet8", "w4a4", WEIGHTS), ("resnet8", "w2a2", ["int8"]), ("resnet20", "w4a8", ["int8"])],
)
def test_no_code_of_a_residual_network_differs(name, scheme, weights):
    check(name, scheme, weights)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BUILD)
def test_no_code_of_an_architecture_differs(name, scheme):
    check(name, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", GATED)
def test_no_code_of_an_architecture_with_gates_differs(name, scheme):
    small = quantized(hostile(GATED[name](), 1), scheme)
    result, _ = exported(small, "int8", images=2)
    assert result.mismatches == 0, str(result.verification)
    gates = [row for row in result.report["ops"] if row["op"] == "multiply"]
    assert len(gates) >= 8
    assert {row["kernels"] for row in gates} == {"XNNPACK"}
