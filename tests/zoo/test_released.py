"""Every released model: its evidence, and its probe tensors on this backend and in LiteRT."""

import json
from pathlib import Path

import numpy as np
import pytest

import tflite_export
from keras_lowbit import zoo
from keras_lowbit.zoo import files, registry
from tests.zoo.scripts import script
from tflite_export import runtime

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "zoo"
pytestmark = pytest.mark.runtime


def probe_images(shape, seed):
    """As `zoo/release.py` draws them, written again so that a change there is noticed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 4, shape[-1]))
    rows, columns = (np.arange(n) * 4 // n for n in shape[:2])
    smooth = coarse[:, rows][:, :, columns]
    return np.clip(smooth + random.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", zoo.list())
def test_probe_tensors_give_the_released_integers(name):
    probes = json.loads((EVIDENCE / name / "probes.json").read_text())
    recipe = json.loads((EVIDENCE / name / "metrics.json").read_text())["recipe"]["export"]
    images = probe_images(probes["shape"], probes["seed"])
    model = zoo.load(name)
    expected = probes["outputs"].pop("float", None)
    if expected is not None:
        # Reals, no codes: logits up to 10 behind 20 layers, whose sums backends order differently;
        # some 1e-5 are seen.
        np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=1e-4)
    for weights, expected in probes["outputs"].items():
        result = tflite_export.convert(
            model,
            target=recipe["target"],
            weights=weights,
            input_type=recipe["input_type"] or None,
            output_type=recipe["output_type"],
        )
        session = runtime.Session(result.content)
        ((tensor, dtype),) = session.inputs.items()
        ran = next(iter(session.run({tensor: images.astype(dtype)}).values()))
        # Reals of codes times one float32 scale: equal codes are equal reals.
        np.testing.assert_array_equal(ran.reshape(len(images), -1), np.float32(expected))
        frozen = result.frozen.predict(images.astype(dtype), verbose=0)
        np.testing.assert_array_equal(
            np.asarray(frozen).reshape(len(images), -1), np.float32(expected)
        )


@pytest.mark.once
def test_a_released_resnet_goes_to_the_edge_tpu():
    # Its shortcuts pad channels.
    model = zoo.load("resnet20_cifar10_w4a4")
    assert tflite_export.check(model, "coral") == []
    images = probe_images((32, 32, 3), 0)
    assert tflite_export.convert(model, "coral", verify=images).mismatches == 0


@pytest.mark.once
@pytest.mark.parametrize("name", zoo.list())
def test_evidence_and_index_agree(name):
    entry = zoo.info(name)
    content = (registry.RELEASED / f"{name}.keras").read_bytes()
    assert (len(content), files.sha256(content)) == (entry.bytes, entry.sha256)
    metrics = json.loads((EVIDENCE / name / "metrics.json").read_text())
    assert metrics["judged_on"] == "test images"
    assert {k: s["accuracy"] for k, s in metrics["accuracy"].items()} == dict(entry.accuracy)
    assert all(file["wrong_codes"] == 0 for file in metrics["files"].values())
    assert (ROOT / "configs" / f"{metrics['recipe']['name']}.toml").is_file()
    assert entry.name in (EVIDENCE / name / "README.md").read_text()


@pytest.mark.once
@pytest.mark.parametrize("name", zoo.list())
def test_the_card_is_what_the_script_writes_and_times_every_file(name):
    entry, metrics = zoo.info(name), json.loads((EVIDENCE / name / "metrics.json").read_text())
    assert set(metrics["latency"]["ms"]) == set(entry.file_bytes)
    assert all(ms > 0 for ms in metrics["latency"]["ms"].values())
    assert (EVIDENCE / name / "README.md").read_text() == script("cards").card(entry, metrics)


@pytest.mark.once
def test_the_table_of_models_is_what_the_script_writes():
    assert (EVIDENCE / "README.md").read_text() == script("cards").overview(registry.entries())


@pytest.mark.once
def test_checkpoints_fit_the_wheel():
    shipped = sum(path.stat().st_size for path in registry.RELEASED.glob("*.keras"))
    assert shipped <= 40 * 2**20
    assert {path.stem for path in registry.RELEASED.glob("*.keras")} == set(zoo.list())
