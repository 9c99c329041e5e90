"""Models of scheme `wta8` and `wta4`: files, packed codes and exports."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.analysis import integer_weights
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.layers import packed_kernels
from keras_lowbit.packed import load_packed, save_packed
from keras_lowbit.transform import calibrate, freeze, quantize_model
from tests.callbacks import tiny


def model(scheme="wta8"):
    return calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])


def integers(quantized):
    graph = integer_graph(quantized)
    return reference.run(graph, {graph.inputs[0]: tiny.images()[0]})


def test_the_middle_is_ternary_and_the_ends_have_eight_bits():
    found = integer_weights(model())
    assert {name: made.bits for name, made in found.items()} == {"first": 8, "middle": 2, "last": 8}
    assert set(np.unique(found["middle"].codes)) == {-1, 0, 1}
    assert found["middle"].scale.shape == (4,)
    assert np.abs(found["first"].codes).max() == 127


@pytest.mark.parametrize("scheme", ["wta8", {"*": "w4a4", "middle": "wta4"}])
def test_files_keep_the_integers_and_two_bits_a_weight(tmp_path, scheme):
    quantized = model(scheme)
    wanted = integers(quantized)
    assert save_packed(quantized, tmp_path / "packed.keras").kept_float == {}
    store = {}
    layer = quantized.get_layer("middle")
    with packed_kernels.writing():
        layer.save_own_variables(store)
    assert store["0_codes"].shape == (-(-int(np.prod(layer.kernel.shape)) * 2 // 8),)
    quantized.save(tmp_path / "full.keras")
    full = keras.models.load_model(tmp_path / "full.keras")
    for again in (full, load_packed(tmp_path / "packed.keras")):
        found = integers(again)
        assert {n: int((found[n] != wanted[n]).sum()) for n in wanted} == dict.fromkeys(wanted, 0)


def test_the_frozen_model_is_the_reference():
    quantized = model("wta4")
    graph = integer_graph(quantized)
    x = tiny.images()[0]
    wanted = reference.run(graph, {graph.inputs[0]: x})[graph.outputs[0]]
    np.testing.assert_array_equal(ops.convert_to_numpy(freeze(quantized)(x)), wanted)


@pytest.mark.runtime
@pytest.mark.once
@pytest.mark.parametrize("scheme", ["wta8", "wta4"])
def test_exported_files_have_no_wrong_code(scheme):
    pytest.importorskip("ai_edge_litert")
    from tflite_export import convert

    x = tiny.images()[0][:4]
    for weights in ("int8", "int4"):
        inputs = keras.Input(tiny.SHAPE)
        y = keras.layers.Conv2D(4, 3, activation="relu", name="stem")(inputs)
        y = keras.layers.Conv2D(4, 1, activation="relu", name="point")(y)
        y = keras.layers.DepthwiseConv2D(3, name="deep")(y)
        y = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(y))
        quantized = calibrate(quantize_model(keras.Model(inputs, y), scheme), x)
        result = convert(quantized, weights=weights, verify=x)
        assert result.mismatches == 0
        (op,) = (op for op in result.graph if op.source == "point")
        assert set(np.unique(op.kernel)) <= {-7, -3, 0, 3, 7}
        assert (op.storage == "int4") == (weights == "int4")
