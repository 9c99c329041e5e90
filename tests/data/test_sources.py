import re
import sys

import keras
import numpy as np
import pytest

from keras_lowbit.data import load

pytestmark = pytest.mark.once


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 5, 7, 3)).astype("uint8"),
        "y_train": np.arange(6) % 3,
        "x_test": rng.integers(0, 256, (3, 5, 7, 3)).astype("uint8"),
        "y_test": np.arange(3) % 3,
    }


@pytest.fixture
def npz(tmp_path, parts):
    path = tmp_path / "toy.npz"
    np.savez_compressed(path, **parts)
    return path


def test_digits_are_split_once_and_for_all():
    data = load("digits")
    assert data.x_train.shape == (1437, 8, 8, 1)
    assert data.x_test.shape == (360, 8, 8, 1)
    assert data.x_train.dtype == "uint8"
    assert data.classes == tuple("0123456789")
    # 17 grey levels, k * 255 / 16
    levels = sorted({round(k * 255 / 16) for k in range(17)})
    assert np.unique(data.x_train).tolist() == levels
    np.testing.assert_array_equal(data.x_test, load("digits").x_test)


def test_digits_keep_the_share_of_each_class():
    data = load("digits")
    whole = np.bincount(np.concatenate([data.y_train, data.y_test]))
    assert np.abs(np.bincount(data.y_test) - whole * 360 / 1797).max() < 1


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=re.escape("pip install keras-lowbit[digits]")):
        load("digits")


def test_a_download_that_fails_says_how_to_pass_a_file(monkeypatch):
    def fails():
        raise Exception("URL fetch failure on a.tar.gz: None -- unreachable")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fails)
    with pytest.raises(ValueError, match=r"cifar10 could not .* unreachable.* pass a file") as info:
        load("cifar10")
    assert "cifar10.npz with x_train, y_train, x_test, y_test" in str(info.value)


def test_keras_datasets_get_channels_and_flat_labels(monkeypatch):
    def arrays():
        x, y = np.zeros((4, 28, 28), "uint8"), np.arange(4).astype("uint8")
        return (x, y[:, None]), (x[:2], y[:2, None])

    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", arrays)
    data = load("fashion_mnist")
    assert data.image_shape == (28, 28, 1)
    assert data.y_test.tolist() == [0, 1]
    assert data.classes[9] == "ankle boot"
    assert data.num_classes == 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar1O", "No data set and no path is called 'cifar1O'. Did you mean 'cifar10'?"),
        ("nowhere/at/all.npz", "Known names: digits, cifar10, cifar100, fashion_mnist, mnist"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_the_known_ones(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(source)


def test_a_folder_of_nobody_is_one_error_that_names_it():
    with pytest.raises(ValueError, match="~nosuch/x: no home folder is known for ~nosuch"):
        load("~nosuch/x")


def test_a_size_that_only_folders_could_have_is_refused(npz):
    assert load(npz, size=(5, 7), channels=3).image_shape == (5, 7, 3)
    assert load("digits", size=8, channels=1).image_shape == (8, 8, 1)
    assert load("digits").image_shape == (8, 8, 1)  # 3 channels are the default
    with pytest.raises(ValueError, match=r"digits has images of 8x8 pixels, and size is 32x32: "):
        load("digits", size=32)
    with pytest.raises(ValueError, match=r"toy\.npz has images of 5x7 pixels, and size is 7x5: "):
        load(npz, size=(7, 5))
    with pytest.raises(ValueError, match=r"toy\.npz has images of 3 channels, and channels is 1: "):
        load(npz, channels=1)
    with pytest.raises(ValueError, match="size must be a positive number of pixels"):
        load("digits", size=0)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("1,2")
    with pytest.raises(ValueError, match=r"data\.csv is neither a \.npz file nor a folder"):
        load(path)


def test_npz_gives_back_its_arrays(npz, parts):
    data = load(str(npz))
    assert data.name == "toy.npz"
    for key, value in parts.items():
        np.testing.assert_array_equal(getattr(data, key), value)


def test_npz_may_name_its_classes(tmp_path, parts):
    path = tmp_path / "toy.npz"
    np.savez(path, **parts, classes=np.array(["cat", "dog", "emu"]))
    assert load(path).classes == ("cat", "dog", "emu")


def test_npz_that_lacks_arrays_lists_what_it_has(tmp_path, parts):
    path = tmp_path / "toy.npz"
    np.savez(path, x_train=parts["x_train"], labels=parts["y_train"])
    with pytest.raises(ValueError, match=r"toy\.npz lacks y_train, x_test, y_test; it has ") as e:
        load(path)
    assert "'labels'" in str(e.value)


def damages():
    def cut(data):
        return data[: len(data) // 2]

    def overwrite(data):
        middle = len(data) // 2
        return data[:middle] + bytes(64) + data[middle + 64 :]

    return {
        "cut off": cut,
        "overwritten": overwrite,
        "empty": lambda data: b"",
        "text": lambda data: b"no archive",
        "header only": lambda data: data[:4],
    }


@pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
def test_a_damaged_npz_is_one_clear_error(npz, damage):
    npz.write_bytes(damage(npz.read_bytes()))
    with pytest.raises(ValueError, match=r"toy\.npz cannot be read as \.npz .* np\.savez"):
        load(npz)


def test_no_flipped_byte_of_an_npz_escapes_as_another_error(npz):
    whole = npz.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        npz.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load(npz)
        except ValueError:
            refused += 1
    assert refused > 0.5 * len(whole) / 7


def test_a_single_array_under_the_name_npz_is_refused(tmp_path):
    path = tmp_path / "toy.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"toy\.npz holds a single array"):
        load(path)


def test_pickled_arrays_are_refused(tmp_path, parts):
    path = tmp_path / "toy.npz"
    np.savez(path, **{**parts, "x_train": np.array([{}, []], dtype=object)})
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load(path)


@pytest.mark.network
def test_mnist_downloads():
    assert load("mnist").x_train.shape == (60000, 28, 28, 1)
