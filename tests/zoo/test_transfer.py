"""The code of `docs/transfer.md`, run at a small size."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transfer.md"
Image = pytest.importorskip("PIL.Image")
pytestmark = [pytest.mark.runtime, pytest.mark.slow]


@pytest.fixture
def page():
    """Names that the page's Python block defines."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path):
    """Three colours under noise: 20 images each, of which a fifth becomes the test part."""
    random = np.random.default_rng(0)
    for c, name in enumerate(("blue", "green", "red")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 120, (36, 40, 3))
            pixels[..., 2 - c] += 100
            image = Image.fromarray(pixels.astype("uint8"))
            image.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_a_released_model_learns_a_folder_of_images_and_its_file_answers(page, folder, tmp_path):
    out = tmp_path / "colours.tflite"
    result, data = page["transfer"](folder, out, epochs=4, batch_size=4)
    assert data.classes == ("blue", "green", "red")
    assert result.mismatches == 0
    answers = page["run"](out, data.x_test)
    assert answers.shape == (12,)
    # Untrained, a head of three classes is right on a third.
    assert (answers == data.y_test).mean() >= 0.75
    frozen = np.asarray(result.frozen.predict(data.x_test, verbose=0))
    np.testing.assert_array_equal(answers, frozen.reshape(12, -1).argmax(-1))
