"""Files of a training in stages that are cut, damaged or of something else."""

import keras
import pytest

from keras_lowbit.training import files
from tests.callbacks import tiny

DAMAGED = r"\.npz is damaged \(.+\)\. Start afresh with an empty directory"


@pytest.mark.once
@pytest.mark.parametrize("text", ["", '{"plan": [', "\x00\x00"])
def test_a_damaged_log_is_named(text, tmp_path):
    path = tmp_path / "stages.json"
    path.write_text(text)
    said = r"stages\.json is damaged \(.+\)\. Start afresh with an empty directory"
    with pytest.raises(ValueError, match=said) as found:
        files.read_json(path, None)
    assert type(found.value) is ValueError


@pytest.mark.once
@pytest.mark.parametrize(
    "text", ["[]", '{"stages": []}', '{"plan": 3}', '{"plan": 3, "stages": 4}']
)
def test_logs_of_another_shape_are_named(text, tmp_path):
    path = tmp_path / "stages.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"stages\.json is damaged \(no log of stages\)"):
        files.read_stages(path)
    assert files.read_stages(tmp_path / "none.json") is None


@pytest.mark.once
@pytest.mark.parametrize("text", ['[{"epoch": 0}]', "[3]"])
def test_rows_of_another_shape_are_named(text, tmp_path):
    path = tmp_path / "epochs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"epochs\.json is damaged \(no rows of epochs\)"):
        files.read_epochs(path)


@pytest.mark.once
def test_a_log_of_something_else_is_named(tmp_path):
    path = tmp_path / "epochs.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"epochs\.json is damaged \(no list\)\. Start afresh"):
        files.read_epochs(path)


@pytest.mark.once
@pytest.mark.parametrize("content", [None, b"", b"PK", b"no archive"])
def test_damaged_weights_of_a_stage_are_named(content, tmp_path):
    model, path = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]), tmp_path / "e.npz"
    files.write_state(model, path)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=DAMAGED) as found:
        files.read_state(model, path)
    assert "pickle" not in str(found.value)
    path.unlink()
    with pytest.raises(ValueError, match=DAMAGED):
        files.read_state(model, path)


def test_weights_of_another_model_are_named(tmp_path):
    files.write_state(tiny.model(), tmp_path / "e.npz")
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"e\.npz belongs to another model than sequential"):
        files.read_state(other, tmp_path / "e.npz")
