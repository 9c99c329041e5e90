"""What README.md shows runs as it is printed, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lowbit as klb
from keras_lowbit_cli.commands import COMMANDS, group

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
USE, ZOO = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("keras-lowbit ")
]


def shortened(code):
    """The block on 64 images; the descent keeps its epochs."""
    code, one = re.subn(r"model\.fit\(batches, epochs=8", "model.fit(batches, epochs=1", code)
    code, two = re.subn(r"(data\.[xy]_train), ", r"\1[:64], ", code)
    assert (one, two) == (1, 2)
    return code


@pytest.mark.runtime
@pytest.mark.once
def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("rose", "tulip", "daisy"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (40, 36, 3), dtype="uint8")
            image.fromarray(pixels).save(tmp_path / "flowers" / name / f"{i}.png")
    names = {}
    exec(compile(shortened(USE), "README.md, Use", "exec"), names)
    assert names["result"].mismatches == 0
    assert Path("m.tflite").stat().st_size == len(names["result"].content)
    kernel_bits = {layer.name: layer.kernel_quantizer.bits for layer in _quantized(names["qmodel"])}
    assert kernel_bits["block1_conv1"] == 4
    again = keras.models.load_model("m.keras", compile=False)
    images = names["data"].x_test[:4]
    np.testing.assert_array_equal(
        again.predict(images, verbose=0), names["qmodel"].predict(images, verbose=0)
    )
    exec(compile(ZOO, "README.md, zoo", "exec"), names)
    assert names["model"].output_shape == (None, 3)
    assert not names["tflite_export"].check(names["model"])


def _quantized(model):
    return [layer for layer in model.layers if getattr(layer, "kernel_quantizer", None)]


@pytest.mark.once
def test_there_are_command_lines():
    assert len(LINES) >= 3


@pytest.mark.once
@pytest.mark.parametrize("line", LINES)
def test_a_command_line_names_a_command_and_flags_that_exist(line):
    words = shlex.split(line, comments=True)[1:]
    if words == ["--help"]:
        return
    count = 2 if group(words[0]) else 1
    command = COMMANDS[" ".join(words[:count])]
    positional = command.flags()(["keras-lowbit", *words[count:]])[1:]
    assert len(positional) == 1
    if words[0] == "train":
        assert (ROOT / positional[0]).is_file()
    if words[0] == "zoo":
        assert positional[0] in klb.zoo.list()


@pytest.mark.once
@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_into_the_repository_lead_somewhere(page):
    found = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    local = [link for link in found if "://" not in link]
    missing = [link for link in local if not ((ROOT / page).parent / link).exists()]
    assert not missing
