"""`reconstruct`: errors fall, what must stay stays, killed runs go on, files are exact."""

import importlib

import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform.quantize_model import quantize_model
from keras_lowbit.tuning import Rates, reconstruct
from keras_lowbit.tuning.block_model import BlockModel, logit_error
from tests.tuning.nets import images, mobile, quantized, small

X = images()


def weights(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables]


def outputs(model, x=X):
    return ops.convert_to_numpy(model(x))


def run(low, model, **options):
    return reconstruct(low, model, X, **{"steps": 3, "batch_size": 8, **options})


def coarse(low):
    """Kernel scales twice as wide as they should be, so that there is something to gain."""
    for layer in low.layers:
        quantizer = getattr(layer, "kernel_quantizer", None)
        if quantizer is not None:
            quantizer.scale.assign(2 * ops.convert_to_numpy(quantizer.scale))
    return low


# Each block compiles once more; these two suffice where it does not matter how many there are.
TWO = {"blocks": ["stem_relu"]}


@pytest.mark.runtime
@pytest.mark.parametrize("norms", [True, False])
def test_errors_fall_and_the_file_stays_exact(norms, tmp_path):
    model = mobile(norms, seed=2)
    before = weights(model)
    low = coarse(quantized(model, "w3a4"))
    statistics = {v.path: np.array(v) for v in low.variables if "moving" in v.path}
    started = float(logit_error([outputs(model)], [outputs(low)]))
    rates = Rates(codes_4bit=2e-2, log_scales=1e-2)
    result = run(low, model, steps=25, rates=rates, blocks=["b2_add"])
    assert float(logit_error([outputs(model)], [outputs(low)])) < 0.7 * started
    bottlenecks, head = result.blocks
    assert bottlenecks.after < 0.8 * bottlenecks.before
    assert "error before" in str(result)
    assert head.name in str(result)
    # Neither the float model nor moving statistics move.
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)
    for v in low.variables:
        if v.path in statistics:
            np.testing.assert_array_equal(statistics[v.path], v)
    low.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(outputs(again), outputs(low))
    assert tflite_export.convert(again, verify=X[:4]).mismatches == 0


def test_the_same_seed_gives_the_same_model_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    model = small()
    unbroken, other, killed, resumed = (quantized(model) for _ in range(4))
    want = run(unbroken, model, seed=4, **TWO)
    run(other, model, seed=5, **TWO)
    assert not np.array_equal(outputs(unbroken), outputs(other))

    count, step = [], BlockModel.train_on_batch

    def dying(self, *args, **kwargs):
        count.append(1)
        if len(count) == 5:  # the second step of the second block
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    start = np.array(killed.get_layer("dw").bias)
    with monkeypatch.context() as patch:
        patch.setattr(BlockModel, "train_on_batch", dying)
        with pytest.raises(KeyboardInterrupt):
            run(killed, model, seed=4, folder=tmp_path, **TWO)
    # The unfinished block is as it was, the finished one is kept.
    np.testing.assert_array_equal(np.array(killed.get_layer("dw").bias), start)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block_000.npz", "run.json"]
    for again in (resumed, killed):
        got = run(again, model, seed=4, folder=tmp_path, **TWO)
        for a, b in zip(weights(again), weights(unbroken), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [b.before for b in got.blocks] == [b.before for b in want.blocks]
    assert all(b.seconds == 0 for b in got.blocks)
    with pytest.raises(ValueError, match=r"another run: seed was 4 and is 6 now"):
        run(quantized(model), model, seed=6, folder=tmp_path, **TWO)
    for name in ("block_000.npz", "run.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged .*Start afresh with an empty"):
            run(quantized(model), model, seed=4, folder=tmp_path, **TWO)
        (tmp_path / name).write_bytes(whole)
    shared = quantized(model, Scheme(4, 4, per_channel=False))
    message = r"another run: quantizers of \w+ was \[\['LSQ', .* and is .*Use another folder"
    with pytest.raises(ValueError, match=message):
        run(shared, model, seed=4, folder=tmp_path, **TWO)


def test_blocks_get_the_steps_of_the_last_pattern_that_matches(monkeypatch):
    model, taken = small(), []
    step = BlockModel.train_on_batch

    def counting(self, *args, **kwargs):
        taken.append(self.program.calls[-1].name)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(BlockModel, "train_on_batch", counting)
    found = run(quantized(model), model, block_steps={"*": 1, "stem_*": 2}, **TWO)
    assert found.blocks[0].name == "stem_relu"
    first, *others = dict.fromkeys(taken)
    assert taken.count(first) == 2
    assert len(others) == 1
    assert taken.count(others[0]) == 1


def test_blocks_get_the_rates_of_the_last_pattern_that_matches():
    model, low = small(), quantized(small())
    before = [np.array(low.get_layer(name).bias) for name in ("stem", "head")]
    fast, slow = Rates(biases=1e-1), Rates(biases=1e-5)
    run(low, model, steps=1, rates=fast, block_rates={"*": fast, "stem*": slow}, **TWO)
    moved = [
        np.abs(np.array(low.get_layer(name).bias) - old).max()
        for name, old in zip(("stem", "head"), before, strict=True)
    ]
    # Adam's first step is the rate; biases then lie on integers of about 1e-4.
    assert moved[0] < 1e-3
    assert 0.09 < moved[1] < 0.11


def test_the_last_blocks_are_trained_as_one_for_the_logits(monkeypatch):
    model, trained = small(), []

    class Watched(BlockModel):
        def __init__(self, program, *, loss, **options):
            trained.append(([call.name for call in program.calls], loss))
            super().__init__(program, loss=loss, **options)

    module = importlib.import_module("keras_lowbit.tuning.reconstruct")  # the name is a function's
    monkeypatch.setattr(module, "BlockModel", Watched)
    (stem, head) = run(quantized(model), model, steps=1, logit_blocks=2).blocks
    assert (stem.name, head.name, head.products) == ("stem_relu", "head", 2)
    names, loss = trained[1]
    assert {"dw", "sum", "head"} <= set(names)
    assert loss is logit_error


def test_streams_that_do_not_fit_give_nearly_the_same_model():
    model = small()
    kept, spilled = quantized(model, "w8a8"), quantized(model, "w8a8")
    run(kept, model, drop=0, **TWO)
    run(spilled, model, drop=0, memory=1, **TWO)
    # float16 streams, 2^-11, through three Adam steps whose size does not depend on the gradient.
    np.testing.assert_allclose(outputs(spilled), outputs(kept), atol=0.02)


def test_a_softmax_at_the_end_is_left_out_of_the_loss():
    model = mobile(softmax=True)
    low = quantized(model, "w4a8")
    result = run(low, model, blocks=["b3_project_bn"], steps=2)
    assert next(b.name for b in result.blocks) == "b3_project_bn"
    np.testing.assert_allclose(outputs(low).sum(-1), 1, rtol=1e-5)  # a float32 softmax
    assert model.get_layer("head").activation.__name__ == "softmax"


def test_a_loss_that_is_not_finite_names_its_block_and_leaves_it_as_it_was():
    model = small()
    low = quantized(model)
    before = weights(low)
    with pytest.raises(FloatingPointError, match=r"block stem_relu is \w+ at step"):
        run(low, model, rates=Rates(log_scales=1e3, biases=1e30), steps=5)
    for old, new in zip(before, weights(low), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.once
class TestRefusals:
    def test_an_uncalibrated_model(self):
        model = small()
        with pytest.raises(ValueError, match=r"calibrate .* first"):
            run(quantize_model(model, "w4a4"), model)

    @pytest.mark.parametrize(
        ("name", "argument"), [("dw", "kernel_quantizer"), ("dw_quantize", "quantizer")]
    )
    def test_a_quantizer_that_is_switched_off(self, name, argument):
        """Its grid would be trained all the same, and errors told of a model that does without."""
        model = small()
        low = quantized(model)
        quantizer = getattr(low.get_layer(name), argument)
        quantizer.add_switch()
        quantizer.set_enabled(False)
        before = weights(low)
        with pytest.raises(ValueError, match=rf"{name}.*switched off.*set_enabled\(True\)"):
            run(low, model)
        for old, new in zip(before, weights(low), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_another_float_model(self):
        with pytest.raises(ValueError, match="Pass the float model"):
            run(quantized(small()), mobile())

    def test_quantizers_without_a_scale(self):
        model = small()
        low = quantized(model, Scheme(4, 4, activation="pact"))
        with pytest.raises(ValueError, match="PACT keeps no scale"):
            run(low, model)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "steps must be"),
            ({"block_steps": {"*": 0}}, r"block_steps\['\*'\] must be"),
            ({"rates": 1e-3}, "rates and block_rates are of tuning.Rates. Got 0.001"),
            ({"block_rates": {"*": {"biases": 1.0}}}, "are of tuning.Rates. Got {'biases': 1.0}"),
            ({"block_rates": {"haed": Rates()}}, "block_rates has 'haed', which matches no block"),
            ({"block_steps": {"haed": 1}}, "'haed', which matches no block"),
            ({"logit_blocks": 0}, "logit_blocks must be"),
            ({"logit_blocks": 4}, "logit_blocks must be at most 3, the blocks of small. Got 4"),
            ({"batch_size": 2.5}, "batch_size must be"),
            ({"drop": 1.5}, "drop must be .* at least 0 and at most 1"),
            ({"memory": 0}, "memory, in bytes, must be .* above 0"),
            ({"blocks": ["haed"]}, "no layer has that name"),
        ],
    )
    def test_arguments_out_of_range(self, options, match):
        model = small()
        with pytest.raises(ValueError, match=match):
            run(quantized(model), model, **options)

    def test_images_of_another_shape(self):
        model = small()
        with pytest.raises(ValueError, match="must have shape"):
            reconstruct(quantized(model), model, X[:, 1:])
