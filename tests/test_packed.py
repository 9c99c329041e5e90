import contextlib
import errno
import functools
import gc
import hashlib
import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from keras_lowbit import packed, weights_file
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from keras_lowbit.integer.graph import dump
from keras_lowbit.layers import Quantize, QuantizedConv2D, packed_kernels
from keras_lowbit.numerics.packing import packed_size
from keras_lowbit.packed import SkipOnce, check_packed, load_packed, save_packed
from keras_lowbit.transform import calibrate, quantize_model

K = keras.layers
IMAGES = np.random.default_rng(0).uniform(0, 1, (6, 7, 5, 3)).astype("float32")


def net(wide=8):
    x = inputs = keras.Input((7, 5, 3), name="image")
    x = K.Conv2D(wide, 3, padding="same", use_bias=False, name="stem")(x)
    x = K.ReLU(name="stem_relu")(K.BatchNormalization(name="stem_bn")(x))
    y = K.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="dw")(x)
    y = K.ReLU(6.0, name="dw_relu")(y)
    y = K.Conv2D(wide, 1, name="pw")(y)
    x = K.Add(name="add")([x, y])
    x = K.SeparableConv2D(5, 3, name="sep")(x)
    x = K.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, K.Dense(3, name="head")(x), name="net")


def quantized(scheme, **kwargs):
    model = quantize_model(net(**kwargs), scheme)
    return calibrate(model, IMAGES)


@functools.cache
def w4a4():
    """One model for all tests that only look at it."""
    return quantized("w4a4")


def codes_of(model):
    """Every tensor that the integer graph computes on IMAGES, and the graph's text."""
    graph = integer_graph(model)
    return reference.run(graph, {graph.inputs[0]: IMAGES}), dump(graph)


def assert_same_integers(first, second):
    (before, text), (after, other) = codes_of(first), codes_of(second)
    assert text == other
    assert list(before) == list(after)
    assert {n: int((before[n] != after[n]).sum()) for n in before} == dict.fromkeys(before, 0)


SCHEMES = [
    {"kernel_bits": 8, "activation_bits": 8},
    {"kernel_bits": 4, "activation_bits": 4, "ends_bits": None},
    {"kernel_bits": 3, "activation_bits": 8, "per_channel": False},
    {"kernel_bits": 2, "activation_bits": 2},
    {"kernel_bits": 1, "activation_bits": 8, "ends_bits": None},
    {"kernel_bits": 1, "activation_bits": 4, "per_channel": False},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_loaded_model_computes_the_same_integers(tmp_path, scheme):
    model = quantized(scheme)
    written = save_packed(model, tmp_path / "m.keras")
    assert written.kept_float == {}
    assert_same_integers(model, keras.models.load_model(tmp_path / "m.keras"))


def test_latents_start_at_code_times_scale_and_train(tmp_path):
    model = w4a4()
    save_packed(model, tmp_path / "m.keras")
    loaded = load_packed(tmp_path / "m.keras")
    for name in ("stem", "dw", "pw", "head"):
        (kernel,) = packed_kernels.kernels(model.get_layer(name))
        codes, scale = kernel.codes()
        latent = keras.ops.convert_to_numpy(loaded.get_layer(name).kernel)
        np.testing.assert_array_equal(latent, codes * scale)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)
    loaded.compile(keras.optimizers.SGD(0.1), "mse")
    before = keras.ops.convert_to_numpy(loaded.get_layer("pw").kernel).copy()
    loaded.fit(IMAGES, np.ones((6, 3)), batch_size=3, verbose=0)
    assert np.abs(keras.ops.convert_to_numpy(loaded.get_layer("pw").kernel) - before).max() > 0


def test_the_stored_codes_are_the_packed_ones(tmp_path):
    model = quantized({"*": "w4a4", "head": "w2a8"})
    save_packed(model, tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        weights = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
    entry = weights["layers/quantized_dense/vars"]
    assert entry.attrs["name"] == "head"
    assert sorted(entry) == ["0_codes", "0_grid", "0_scale", "1", "sha256"]
    assert entry["0_codes"].shape == (packed_size(5 * 3, 2),) == (4,)
    assert entry["0_grid"][:].tolist() == [2, -2, 1, 0]
    (kernel,) = packed_kernels.kernels(model.get_layer("head"))
    codes, _ = kernel.codes()
    # Two bits a code, low bits first: bit pairs of the first byte are the first four codes.
    first = [(int(entry["0_codes"][0]) >> shift & 3) - 2 for shift in (0, 2, 4, 6)]
    assert first == codes.reshape(-1)[:4].tolist()


def test_the_file_is_hardly_larger_than_its_codes(tmp_path):
    model = quantized("w2a4", wide=512)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # state to leave out
    written = save_packed(model, tmp_path / "m.keras")
    kernels = [k for layer in model.layers for k in packed_kernels.kernels(layer)]
    sizes = [int(np.prod(k.latent.shape)) for k in kernels]
    codes = sum(packed_size(n, k.quantizer.bits) for n, k in zip(sizes, kernels, strict=True))
    remaining = 4 * (model.count_params() - sum(sizes))
    assert codes + remaining > 150_000  # else the allowance alone would pass
    assert written.size <= 1.1 * (codes + remaining) + 64 * 1024
    assert written.size == (tmp_path / "m.keras").stat().st_size


def test_the_file_loads_in_safe_mode_without_pickle_or_compile_settings(tmp_path):
    model = quantized("w4a4")
    model.compile("adam", "mse")
    save_packed(model, tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", safe_mode=True)
    assert not loaded.compiled
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        # A fourth member would make Keras unpack the archive to disk.
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
        assert all(i.compress_type == zipfile.ZIP_DEFLATED for i in archive.infolist())
        assert b"optimizer" not in archive.read("model.weights.h5")
        assert b"Lambda" not in archive.read("config.json")


def test_loading_runs_no_random_initializer(tmp_path, monkeypatch):
    save_packed(w4a4(), tmp_path / "m.keras")

    def forbidden(self, *args, **kwargs):
        raise AssertionError("a random initializer ran")

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", forbidden)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    with pytest.raises(AssertionError, match="a random initializer ran"):
        keras.models.clone_model(loaded)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(tmp_path, monkeypatch, enabled, fails):
    path = tmp_path / "m.keras"
    save_packed(quantized("w4a4"), path)
    during = []

    def fill(model, content):
        during.append(gc.isenabled())
        if fails:
            raise RuntimeError("no memory")
        weights_file.fill(model, content)

    monkeypatch.setattr(packed, "fill", fill)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            load_packed(path)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert during == [False]


def test_a_copy_of_a_loaded_layer_starts_at_random(tmp_path):
    save_packed(w4a4(), tmp_path / "m.keras")
    copy = keras.models.clone_model(keras.models.load_model(tmp_path / "m.keras"))
    assert np.ptp(keras.ops.convert_to_numpy(copy.get_layer("pw").kernel)) > 0


def test_skip_once_gives_zeros_then_what_it_wraps():
    initializer = SkipOnce(keras.initializers.RandomNormal(seed=1))
    again = SkipOnce.from_config(json.loads(json.dumps(initializer.get_config())))
    assert np.all(keras.ops.convert_to_numpy(again((2, 3), "float32")) == 0)
    assert np.all(keras.ops.convert_to_numpy(again((2, 3), "float32")) != 0)
    assert again.get_config()["skip"] is False


def test_packing_a_loaded_file_gives_the_same_weights(tmp_path):
    model = quantized({"kernel_bits": 1, "activation_bits": 8})
    save_packed(model, tmp_path / "a.keras")
    save_packed(load_packed(tmp_path / "a.keras"), tmp_path / "b.keras")
    first, second = (check_packed(tmp_path / f"{n}.keras")["sha256"] for n in "ab")
    assert first["model.weights.h5"] == second["model.weights.h5"]


@keras.saving.register_keras_serializable(package="tests")
class Gain:
    """Something that layers share; Keras writes it once and numbers it."""

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls()


@keras.saving.register_keras_serializable(package="tests")
class Gained(K.Layer):
    def __init__(self, gain, **kwargs):
        super().__init__(**kwargs)
        self.gain = gain

    def call(self, inputs):
        return inputs

    def get_config(self):
        # Not serialized here: of a copy Keras would number the later ones only.
        return {**super().get_config(), "gain": self.gain}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "gain": keras.saving.deserialize_keras_object(config["gain"])})


def test_an_object_that_two_layers_share_is_one_object_afterwards(tmp_path):
    gain, inputs = Gain(), keras.Input((7, 5, 3))
    x = QuantizedConv2D(2, 1)(Quantize("lsq")(inputs))
    model = keras.Model(inputs, Gained(gain, name="b")(Gained(gain, name="a")(x)))
    save_packed(model, tmp_path / "m.keras")
    loaded = load_packed(tmp_path / "m.keras")
    assert loaded.get_layer("a").gain is loaded.get_layer("b").gain


def test_nested_models_are_packed(tmp_path):
    inner = quantize_model(net(), "w4a4")
    calibrate(inner, IMAGES)
    inputs = keras.Input((7, 5, 3))
    outer = keras.Model(inputs, K.Softmax(name="p")(inner(inputs)))
    save_packed(outer, tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        outer.predict(IMAGES, verbose=0), loaded.predict(IMAGES, verbose=0)
    )
    kernel = loaded.get_layer(inner.name).get_layer("pw").kernel
    assert len(np.unique(keras.ops.convert_to_numpy(kernel)[..., 0])) <= 15


def test_weights_of_a_packed_file_load_into_the_model_at_other_bits(tmp_path):
    model = quantized("w2a8")
    save_packed(model, tmp_path / "m.keras")
    other = quantized("w8a8")
    other.load_weights(tmp_path / "m.keras")
    assert other.get_layer("pw").kernel_quantizer.bits == 2
    assert_same_integers(model, other)


def test_a_kernel_that_cannot_be_packed_stays_float_and_is_named(tmp_path):
    model = quantized("w8a8")
    model.get_layer("pw").kernel_quantizer.set_bits(12)
    written = save_packed(model, tmp_path / "m.keras")
    assert written.kept_float == {"pw": "its kernel has 12 bits, and at most 8 are packed"}
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(loaded.get_layer("pw").kernel),
        keras.ops.convert_to_numpy(model.get_layer("pw").kernel),
    )


def test_model_save_still_keeps_the_latents(tmp_path):
    model = w4a4()
    save_packed(model, tmp_path / "packed.keras")
    model.save(tmp_path / "full.keras")
    loaded = keras.models.load_model(tmp_path / "full.keras")
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (before, after)))


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("count", [1, 7, 9, 27, 64, 1152, 4608])
def test_a_binary_kernels_magnitudes_have_exactly_the_mean(count, reciprocal):
    def mean(total):
        n = np.float32(count)
        return total * (np.float32(1) / n) if reciprocal else total / n

    random = np.random.default_rng(count)
    x = random.normal(0, 0.05, (count, 133)).astype("float32")
    scale = mean(np.abs(x).sum(axis=0))
    codes = np.where(x >= 0, 1, -1).astype("int8")
    made = packed_kernels.latents(codes, scale, 1, None, reciprocal=reciprocal)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(np.sign(made), codes)
    # In any order: every partial sum is exact.
    for order in (slice(None), slice(None, None, -1), random.permutation(count)):
        total = np.cumsum(np.abs(made[order]), axis=0, dtype="float32")[-1]
        np.testing.assert_array_equal(mean(total), scale)
    # Multiples of a unit of which the sum is 2^23 at least: of 4,608, one in 1,820 off.
    np.testing.assert_allclose(np.abs(made), np.broadcast_to(scale, made.shape), rtol=1e-3)


# --- failing well -----------------------------------------------------------------------------


def rewritten(path, change):
    """The archive with `change(name, content)` for each member."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def with_one_code_changed(content):
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "a") as weights:
        codes = weights["layers/quantized_dense/vars/0_codes"]
        codes[0] = codes[0] ^ 1
    return buffer.getvalue()


# Keras warns about containers that mirror the failed layer before it raises.
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_a_changed_code_is_refused_by_keras_and_by_load_packed(tmp_path):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    rewritten(path, lambda n, c: with_one_code_changed(c) if n.endswith("h5") else c)
    with pytest.raises(ValueError, match="head: its packed weights are damaged"):
        keras.models.load_model(path)
    with pytest.raises(ValueError, match=r"m\.keras is damaged: SHA-256 of model\.weights\.h5"):
        load_packed(path)


def test_a_changed_config_is_refused(tmp_path):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    rewritten(path, lambda n, c: c.replace(b"relu", b"tanh") if n == "config.json" else c)
    with pytest.raises(ValueError, match=r"m\.keras is damaged: SHA-256 of config\.json"):
        load_packed(path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_flipped_byte_names_the_file(tmp_path, place):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"m\.keras is damaged"):
        load_packed(path)


def test_a_truncated_file_names_the_file(tmp_path):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"m\.keras is damaged or cut"):
        load_packed(path)


def test_the_manifest_holds_the_hash_of_the_weights(tmp_path):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    with zipfile.ZipFile(path) as archive:
        expected = hashlib.sha256(archive.read("model.weights.h5")).hexdigest()
    assert check_packed(path)["sha256"]["model.weights.h5"] == expected


def test_other_files_are_refused_by_load_packed(tmp_path):
    net().save(tmp_path / "plain.keras")
    with pytest.raises(ValueError, match=r"plain\.keras was not written by .*save_packed"):
        load_packed(tmp_path / "plain.keras")
    with pytest.raises(ValueError, match=r"none\.keras: no such file"):
        load_packed(tmp_path / "none.keras")


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "m.keras"
    save_packed(w4a4(), path)
    rewritten(path, lambda n, c: c.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(ValueError, match="has format 9; this version reads up to 1"):
        load_packed(path)


HASHES = {"config.json": "0" * 64, "model.weights.h5": "0" * 64}
SOUND = {"format": 1, "sha256": HASHES, "kept_float": {}}
DAMAGED = {
    "metadata is a list": ([SOUND], "metadata.json holds list, no object"),
    "metadata is a number": (1, "metadata.json holds int, no object"),
    "manifest is a string": ("1", "is str, no object"),
    "manifest is a list": ([1], "is list, no object"),
    "manifest is null": (None, "is NoneType, no object"),
    "no format": ({"sha256": HASHES, "kept_float": {}}, "has format None, no whole number"),
    "format is a string": ({**SOUND, "format": "1"}, "has format '1', no whole number"),
    "format is a real": ({**SOUND, "format": 1.5}, "has format 1.5, no whole number"),
    "format is a truth": ({**SOUND, "format": True}, "has format True, no whole number"),
    "format is 0": ({**SOUND, "format": 0}, "has format 0, no whole number"),
    "no hashes": ({"format": 1, "kept_float": {}}, "lists SHA-256 of nothing"),
    "hashes are a list": ({**SOUND, "sha256": list(HASHES)}, "lists SHA-256 of nothing"),
    "hashes are a string": ({**SOUND, "sha256": "0" * 64}, "lists SHA-256 of nothing"),
    "no hash of the config": (
        {**SOUND, "sha256": {"model.weights.h5": "0" * 64}},
        r"lists SHA-256 of model\.weights\.h5, not of config\.json and model\.weights\.h5",
    ),
    "no hash of the weights": (
        {**SOUND, "sha256": {"config.json": "0" * 64}},
        r"lists SHA-256 of config\.json, not of config\.json and model\.weights\.h5",
    ),
    "a third hash": (
        {**SOUND, "sha256": {**HASHES, "metadata.json": "0" * 64}},
        r"lists SHA-256 of config\.json, metadata\.json, model\.weights\.h5, not of",
    ),
    "a hash is a number": ({**SOUND, "sha256": {**HASHES, "config.json": 1}}, "SHA-256 of config"),
    "no kept kernels": ({"format": 1, "sha256": HASHES}, "has kept_float None, no object"),
    "kept kernels are a list": ({**SOUND, "kept_float": ["pw"]}, "has kept_float .'pw'., no obj"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file of `save_packed`; do not write there."""
    path = tmp_path_factory.mktemp("sound") / "m.keras"
    save_packed(w4a4(), path)
    return path


def with_manifest(path, change):
    """The file with `change(metadata)` in place of its metadata."""

    def change_metadata(name, content):
        if name != "metadata.json":
            return content
        return json.dumps(change(json.loads(content))).encode()

    rewritten(path, change_metadata)


@pytest.mark.parametrize("read", [check_packed, load_packed])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_told_with_the_file_and_the_way_out(sound, tmp_path, damage, read):
    path = tmp_path / "m.keras"
    path.write_bytes(sound.read_bytes())
    manifest, message = DAMAGED[damage]
    whole = damage.startswith("metadata")
    with_manifest(path, lambda old: manifest if whole else {**old, "keras_lowbit": manifest})
    with pytest.raises(ValueError, match=rf"m\.keras is damaged: .*{message}.* again$"):
        read(path)


def test_a_newer_format_may_list_other_hashes(sound, tmp_path):
    path = tmp_path / "m.keras"
    path.write_bytes(sound.read_bytes())
    newer = {"keras_lowbit": {"format": 2, "sha256": {"codes.bin": "0" * 64}}}
    with_manifest(path, lambda old: {**old, **newer})
    with pytest.raises(ValueError, match="has format 2; this version reads up to 1"):
        check_packed(path)


def test_a_flipped_bit_that_asks_for_a_password_names_the_file(sound, tmp_path):
    content = bytearray(sound.read_bytes())
    # Bit 0 of the flags of the last member in the list at the archive's end.
    content[content.rfind(b"PK\x01\x02") + 8] ^= 1
    path = tmp_path / "m.keras"
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"m\.keras is damaged or cut: .*Get the file again"):
        check_packed(path)


@pytest.mark.parametrize("where", ["first save", "rewrite"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "m.keras"
    model = w4a4()
    save_packed(model, path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (
        (keras.saving, "save_model") if where == "first save" else (zipfile.ZipFile, "writestr")
    )
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match="No space left on device; nothing was written") as error:
        save_packed(model, path)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]


def test_what_cannot_be_written_is_said_before_work_starts(tmp_path):
    model = w4a4()
    with pytest.raises(ValueError, match=r"save_packed writes \.keras files. Got .*m\.h5"):
        save_packed(model, tmp_path / "m.h5")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere\. Make it first"):
        save_packed(model, tmp_path / "nowhere" / "m.keras")
    with pytest.raises(ValueError, match="net has no quantized layer"):
        save_packed(net(), tmp_path / "m.keras")
