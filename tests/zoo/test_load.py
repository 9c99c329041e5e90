"""Loading released models: from the package, a cache or a URL, and for other data."""

import dataclasses
import hashlib
import os
import socket
import threading

import keras
import numpy as np
import pytest

import keras_lowbit as klb
import tflite_export
from keras_lowbit.zoo import files, load, registry
from keras_lowbit.zoo import list as list_models


@pytest.mark.once
def test_names_and_patterns_are_texts():
    with pytest.raises(ValueError, match=r"zoo.list: a pattern is text such as .* Got 3"):
        list_models(3)
    with pytest.raises(ValueError, match=r"No released model \['resnet8'\]\."):
        load(["resnet8"])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A tiny trained-like model and its packed file."""
    keras.utils.set_random_seed(3)
    image = keras.Input((9, 9, 3))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, padding="same", name="conv")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    net = keras.Model(image, keras.layers.Dense(5, name="logits")(x), name="tiny")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 9, 9, 3)).astype("float32")
    model = klb.calibrate(klb.quantize_model(net, "w4a4"), pixels)
    path = tmp_path_factory.mktemp("release") / "tiny_w4a4.keras"
    klb.save_packed(model, path)
    return model, path.read_bytes(), pixels


@pytest.fixture
def shelf(release, tmp_path, monkeypatch):
    """An index that knows the tiny model, and the folder of shipped files, still empty."""
    _, content, _ = release
    entry = registry.Entry(
        name="tiny_w4a4",
        architecture="tiny",
        data="noise",
        scheme="w4a4",
        input_shape=(9, 9, 3),
        classes=5,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        accuracy={"float": 0.5, "int8": 0.25},
        interval=(0.2, 0.3),
        file_bytes={"int8": 2000},
        origin="made by a test",
    )
    folder = tmp_path / "released"
    folder.mkdir()
    other = dataclasses.replace(entry, name="tiny_w8a8")
    text = registry.as_json({"tiny_w4a4": entry, "tiny_w8a8": other})
    (folder / "index.json").write_text(text)
    monkeypatch.setattr(registry, "RELEASED", folder)
    monkeypatch.setattr(registry, "INDEX", folder / "index.json")
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(files.URL_VARIABLE, raising=False)
    return folder


def test_a_shipped_model_has_the_integers_that_were_released(release, shelf):
    model, content, pixels = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    loaded = load("tiny_w4a4")
    ours = tflite_export.convert(model, verify=pixels[:2])
    theirs = tflite_export.convert(loaded, verify=pixels[:2])
    assert ours.mismatches == theirs.mismatches == 0
    assert ours.content == theirs.content


def test_a_float_model_is_read_as_keras_wrote_it(shelf):
    keras.utils.set_random_seed(4)
    image = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    net = keras.Model(image, keras.layers.Dense(5, name="logits")(x))
    net.save(shelf / "tiny_w4a4.keras")
    content = (shelf / "tiny_w4a4.keras").read_bytes()
    entry = dataclasses.replace(
        registry.info("tiny_w4a4"),
        scheme=registry.FLOAT,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        accuracy={"float": 0.5},
        file_bytes={},
    )
    (shelf / "index.json").write_text(registry.as_json({"tiny_w4a4": entry}))
    assert str(registry.info("tiny_w4a4")).splitlines()[2] == f"bytes: as it is {len(content):,}"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3)).astype("float32")
    wanted = np.asarray(net.predict(pixels, verbose=0))
    loaded = load("tiny_w4a4")
    # One backend, one graph: what differs is at most the order of sums. The logits are some
    # hundreds (pixels 0..255), where neighbours of float32 lie 1.5e-5 apart.
    np.testing.assert_allclose(loaded.predict(pixels, verbose=0), wanted, rtol=1e-5, atol=1e-4)
    features = np.asarray(load("tiny_w4a4", include_top=False).predict(pixels, verbose=0))
    # The same bounds: NumPy sums the head's four products in an order of its own.
    logits = features @ net.get_weights()[-2] + net.get_weights()[-1]
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-4)
    new = load("tiny_w4a4", classes=2)
    assert new.output_shape == (None, 2)
    np.testing.assert_array_equal(new.get_weights()[0], net.get_weights()[0])
    klb.quantize_model(new, "w4a4")  # a start for low-bit models


@pytest.mark.once
def test_names_are_listed_by_pattern(shelf):
    assert list_models() == ["tiny_w4a4", "tiny_w8a8"]
    assert list_models("*w8*") == ["tiny_w8a8"]
    assert list_models("resnet*") == []


@pytest.mark.once
def test_an_entry_survives_its_index(shelf):
    entry = registry.info("tiny_w4a4")
    assert (entry.input_shape, entry.interval) == ((9, 9, 3), (0.2, 0.3))
    assert registry.entries() == {e: registry.info(e) for e in ("tiny_w4a4", "tiny_w8a8")}
    assert "w4a4" in str(entry)
    assert "int8 25.00%" in str(entry)


@pytest.mark.once
def test_a_wrong_name_lists_the_nearest(shelf):
    with pytest.raises(ValueError, match=r"'tiny_w3a3'.*Did you mean 'tiny_w4a4'|'tiny_w8a8'"):
        load("tiny_w3a3")


@pytest.mark.once
def test_an_index_of_a_newer_format_is_refused(shelf):
    (shelf / "index.json").write_text('{"format": 99, "models": {}}')
    with pytest.raises(ValueError, match=r"format 99.*Upgrade keras-lowbit"):
        registry.info("tiny_w4a4")


@pytest.mark.once
def test_a_download_lands_in_the_cache_and_is_used_again(release, shelf, tmp_path):
    _, content, _ = release
    server = tmp_path / "server"
    server.mkdir()
    (server / "tiny_w4a4.keras").write_bytes(content)
    entry = registry.info("tiny_w4a4")
    kept = files.find(entry, url=server.as_uri())
    assert kept == tmp_path / "cache" / "tiny_w4a4.keras"
    (server / "tiny_w4a4.keras").unlink()
    assert files.find(entry) == kept
    assert os.listdir(kept.parent) == ["tiny_w4a4.keras"]


@pytest.mark.once
def test_without_a_url_the_error_says_where_to_put_the_file(shelf):
    with pytest.raises(
        ValueError, match=r"neither in the package nor in .*cache.*KERAS_LOWBIT_URL"
    ):
        load("tiny_w4a4")


@pytest.mark.once
def test_a_shipped_model_needs_no_home_folder(release, shelf, monkeypatch, homeless):
    monkeypatch.delenv(files.CACHE_VARIABLE)
    (shelf / "tiny_w4a4.keras").write_bytes(release[1])
    assert files.find(registry.info("tiny_w4a4")) == shelf / "tiny_w4a4.keras"


@pytest.mark.once
def test_a_download_without_a_home_folder_asks_for_another_cache(shelf, monkeypatch, homeless):
    monkeypatch.delenv(files.CACHE_VARIABLE)
    said = r"~/\.cache/keras_lowbit: no home folder .* \(cache=, or KERAS_LOWBIT_CACHE\)"
    with pytest.raises(ValueError, match=said):
        load("tiny_w4a4")
    with pytest.raises(ValueError, match=r"~nosuch/c: no home folder is known for ~nosuch"):
        load("tiny_w4a4", cache="~nosuch/c")


@pytest.mark.once
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/models", "nonsense"])
def test_a_missing_network_is_one_error_and_leaves_nothing(shelf, tmp_path, url):
    with pytest.raises(OSError, match=f"Could not get {url}/tiny_w4a4.keras"):
        load("tiny_w4a4", url=url)
    assert not (tmp_path / "cache").exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789", r"10 bytes read, 990 more"),
        (b"no HTTP\r\n\r\n", "no HTTP"),
    ],
    ids=["cut", "no HTTP"],
)
def test_an_answer_that_breaks_off_is_one_error_and_leaves_nothing(shelf, tmp_path, answer, reason):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            OSError, match=f"Could not get {url}/tiny_w4a4.keras: .*{reason}.*cache="
        ):
            load("tiny_w4a4", url=url)
        thread.join()
    assert not (tmp_path / "cache").exists()


@pytest.mark.once
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_refused_and_stays(release, shelf, damage):
    _, content, _ = release
    broken = content[:-100] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:]
    (shelf / "tiny_w4a4.keras").write_bytes(broken)
    with pytest.raises(ValueError, match=r"SHA-256 is .* expected"):
        load("tiny_w4a4")
    assert (shelf / "tiny_w4a4.keras").read_bytes() == broken


@pytest.mark.once
def test_a_wrong_download_is_not_kept(shelf, tmp_path):
    server = tmp_path / "server"
    server.mkdir()
    (server / "tiny_w4a4.keras").write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"SHA-256.*Nothing was kept"):
        load("tiny_w4a4", url=server.as_uri())
    assert not (tmp_path / "cache").exists()


@pytest.mark.once
@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_download_has_the_usual_mode_for_those_who_share_the_cache(
    release, shelf, tmp_path, umask, mode
):
    server = tmp_path / "server"
    server.mkdir()
    (server / "tiny_w4a4.keras").write_bytes(release[1])
    before = os.umask(umask)
    try:
        kept = files.find(registry.info("tiny_w4a4"), url=server.as_uri())
    finally:
        os.umask(before)
    assert kept.stat().st_mode & 0o777 == mode
    assert [path.name for path in kept.parent.iterdir()] == ["tiny_w4a4.keras"]


@pytest.mark.once
def test_a_cache_that_cannot_be_written_is_named(release, shelf, tmp_path):
    _, content, _ = release
    server = tmp_path / "server"
    server.mkdir()
    (server / "tiny_w4a4.keras").write_bytes(content)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="choose another folder"):
        load("tiny_w4a4", url=server.as_uri(), cache=blocked / "inside")


def test_another_image_size_keeps_the_weights(release, shelf):
    _, content, _ = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    wide = load("tiny_w4a4", input_shape=(12, 15, 3))
    assert wide.input_shape == (None, 12, 15, 3)
    before = load("tiny_w4a4")
    for a, b in zip(wide.get_weights(), before.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"takes images \(height, width, 3\)"):
        load("tiny_w4a4", input_shape=(12, 15, 1))


def test_features_are_what_the_head_reads(release, shelf):
    model, content, pixels = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    features = load("tiny_w4a4", include_top=False)
    found = np.asarray(features.predict(pixels, verbose=0))
    assert found.shape == (16, 4)
    head = load("tiny_w4a4").get_layer("logits")
    codes = found / np.asarray(keras.ops.convert_to_numpy(_scale(model)))
    # Reals of a grid: whole numbers of steps, up to one float32 rounding of the division.
    assert np.abs(codes - np.round(codes)).max() < 1e-3
    assert head.kernel.shape == (4, 5)


def _scale(model):
    (grid,) = (
        layer
        for layer in model.layers
        if isinstance(layer, klb.layers.Quantize) and layer.output[0].shape == (None, 4)
    )
    return grid.quantizer.scale


@pytest.mark.once
def test_classes_need_the_top(shelf):
    with pytest.raises(ValueError, match="classes needs include_top=True"):
        load("tiny_w4a4", classes=3, include_top=False)


def test_a_new_head_trains_and_exports_with_no_wrong_code(release, shelf):
    _, content, pixels = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    model = load("tiny_w4a4", classes=3)
    assert model.output_shape == (None, 3)
    before = np.asarray(keras.ops.convert_to_numpy(model.get_layer("conv").kernel))
    original = load("tiny_w4a4").get_layer("conv").kernel
    np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(original))
    scales = {v.path: np.asarray(v) for v in model.variables if v.path.endswith("scale")}
    klb.calibrate(model, pixels, only_new=True)
    moved = [
        v.path
        for v in model.variables
        if v.path in scales and not np.array_equal(v, scales[v.path])
    ]
    assert len(moved) == 1
    assert "logits" in moved[0]
    model.compile(
        keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(pixels, np.arange(16) % 3, epochs=1, verbose=0)
    result = tflite_export.convert(model, verify=pixels[:2])
    assert result.mismatches == 0
    # Who reads the file by name need not know that it has another head.
    assert result.graph.outputs == tflite_export.convert(load("tiny_w4a4")).graph.outputs


def test_as_many_classes_of_ones_own_get_a_fresh_head_too(release, shelf):
    _, content, _ = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    trained = load("tiny_w4a4")
    count = trained.output_shape[-1]
    model = load("tiny_w4a4", classes=count)
    kernel = model.get_layer(f"logits_{count}").kernel
    old = trained.get_layer("logits").kernel
    assert not np.array_equal(keras.ops.convert_to_numpy(kernel), keras.ops.convert_to_numpy(old))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "3"}, "classes must be a whole number of at least 1. Got '3'"),
        ({"classes": True}, "classes must be a whole number"),
        ({"classes": 3.7}, "classes must be a whole number"),
        ({"input_shape": 48}, "input_shape is height, width and channels in pixels. Got 48"),
        ({"input_shape": (48.5, 48, 3)}, "each of its numbers must be a whole number"),
        ({"cache": 3}, "cache must be the path of a folder. Got 3"),
    ],
)
def test_shapes_classes_and_caches_of_another_type_are_refused(release, shelf, options, message):
    _, content, _ = release
    (shelf / "tiny_w4a4.keras").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("tiny_w4a4", **options)
