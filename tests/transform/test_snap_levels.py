"""Learned levels from training to an exact file."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.analysis import integer_weights
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.values import NotExportable
from keras_lowbit.packed import load_packed, save_packed
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import calibrate, freeze, quantize_model, snap_levels
from tests.callbacks import tiny


def model(per_filter=False, bits=2, compiled=True, mode="codebook"):
    options = {"per_filter": per_filter, "mode": mode}
    scheme = Scheme(bits, 4, kernel="levels", kernel_options=options)
    quantized = calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])
    if compiled:
        tiny.compile_(quantized)
    return quantized


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def levels_in(quantized):
    layer = quantized.get_layer("middle")
    return numpy(layer.kernel_quantizer.levels()), numpy(layer.kernel_quantizer(layer.kernel))


def integers(quantized):
    graph = integer_graph(quantized)
    return reference.run(graph, {graph.inputs[0]: tiny.images()[0]})


def test_levels_start_at_the_kernel_and_ends_stay_uniform():
    quantized = model()
    levels, kernel = levels_in(quantized)
    assert len(np.unique(kernel)) == len(levels) == 4
    assert type(quantized.get_layer("last").kernel_quantizer).__name__ == "LSQ"


@pytest.mark.parametrize("per_filter", [False, True])
def test_levels_train_then_rest_while_latents_go_on(per_filter):
    quantized = model(per_filter)
    start = levels_in(quantized)[0]
    tiny.train(quantized, [], epochs=1)
    trained = levels_in(quantized)[0]
    assert np.all(trained != start)
    snap_levels(quantized)
    quantizer, latent = (getattr(quantized.get_layer("middle"), n) for n in _OF_THE_KERNEL)
    table, before = quantizer.code_table(), numpy(latent)
    tiny.train(quantized, [], epochs=1)
    np.testing.assert_array_equal(quantizer.code_table(), table)
    assert np.any(numpy(latent) != before)
    codes = integer_weights(quantized)["middle"].codes
    columns = codes.reshape(-1, 4)
    tables = table if per_filter else np.stack([table] * 4, axis=-1)
    assert all(set(columns[:, c]) <= set(tables[:, c]) for c in range(4))


_OF_THE_KERNEL = ("kernel_quantizer", "kernel")


@pytest.mark.parametrize("per_filter", [False, True])
@pytest.mark.parametrize("mode", ["basis", "selector"])
def test_what_chooses_trains_in_the_other_modes(mode, per_filter):
    quantized = model(per_filter, mode=mode)
    layer = quantized.get_layer("middle")
    chooses = getattr(layer.kernel_quantizer, _CHOOSES[mode])
    before, kernel, levels = numpy(chooses), numpy(layer.kernel), levels_in(quantized)[0]
    tiny.train(quantized, [], epochs=1)
    assert np.all(levels_in(quantized)[0] != levels)
    snap_levels(quantized)
    tiny.train(quantized, [], epochs=1)
    assert np.any(numpy(chooses) != before)
    np.testing.assert_array_equal(numpy(layer.kernel), kernel)


_CHOOSES = {"basis": "latents", "selector": "logits"}


@pytest.mark.parametrize("per_filter", [False, True])
@pytest.mark.parametrize("mode", ["codebook", "basis", "selector"])
def test_files_keep_the_integers(tmp_path, per_filter, mode):
    quantized = snap_levels(model(per_filter, compiled=False, mode=mode))
    wanted = integers(quantized)
    quantized.save(tmp_path / "full.keras")
    written = save_packed(quantized, tmp_path / "packed.keras")
    assert written.kept_float == {}
    full = keras.models.load_model(tmp_path / "full.keras")
    for again in (full, load_packed(tmp_path / "packed.keras")):
        found = integers(again)
        assert {n: int((found[n] != wanted[n]).sum()) for n in wanted} == dict.fromkeys(wanted, 0)


def test_a_packed_kernel_takes_two_bits_a_weight(tmp_path):
    from keras_lowbit.layers import packed_kernels

    layer = snap_levels(model()).get_layer("middle")
    store = {}
    with packed_kernels.writing():
        layer.save_own_variables(store)
    assert store["0_codes"].shape == (-(-layer.kernel.shape[0] * 3 * 3 * 4 * 2 // 8),)
    assert store["0_table"].shape == (4,)


def test_the_frozen_model_is_the_reference():
    quantized = snap_levels(model())
    graph = integer_graph(quantized)
    x = tiny.images()[0]
    wanted = reference.run(graph, {graph.inputs[0]: x})[graph.outputs[0]]
    np.testing.assert_array_equal(numpy(freeze(quantized)(x)), wanted)


@pytest.mark.runtime
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("mode", ["codebook", "basis", "selector"])
def test_the_exported_file_has_no_wrong_code(weights, mode):
    pytest.importorskip("ai_edge_litert")
    from tflite_export import convert

    result = convert(
        snap_levels(model(True, mode=mode)), weights=weights, verify=tiny.images()[0][:4]
    )
    assert result.mismatches == 0


def test_before_the_snap_there_is_one_way_out(tmp_path):
    quantized = model()
    for export in (freeze, integer_weights, lambda m: save_packed(m, tmp_path / "m.keras")):
        with pytest.raises(ValueError, match=r"middle.*levels are reals.*snap_levels\(model\)"):
            export(quantized)
    with pytest.raises(NotExportable, match=r"^middle: "):
        freeze(quantized)
    assert list(tmp_path.iterdir()) == []


def test_snapping_twice_changes_nothing():
    quantized = snap_levels(model())
    before = levels_in(quantized)[1]
    np.testing.assert_array_equal(levels_in(snap_levels(quantized))[1], before)


@pytest.mark.once
def test_a_model_without_levels_is_refused():
    with pytest.raises(ValueError, match=r"tiny_quantized has no kernel with learned levels"):
        snap_levels(tiny.model("w4a4", compiled=False))
