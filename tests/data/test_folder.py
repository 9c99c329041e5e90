import re
import shutil
import sys
import types

import numpy as np
import pytest

from keras_lowbit.data import folder, holdout, load
from keras_lowbit.data.folder import LazyImages, read_folder, read_image

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.once


def paint(path, value, size=(6, 5), mode="RGB"):
    """Write an image of one colour, `size` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode in ("L", "P") else (value, 0, 255 - value)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def two_parts(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(tmp_path / part / name / f"{i}.png", 100 * c + i)
    return tmp_path


def test_train_and_val_folders_become_the_two_parts(two_parts):
    (two_parts / "train" / "cat" / "notes.txt").write_text("no image")
    (two_parts / ".hidden").mkdir()
    data = load(two_parts)
    assert data.x_train.shape == (6, 5, 6, 3)
    assert data.x_train.dtype == "uint8"
    assert data.x_test.shape == (4, 5, 6, 3)
    assert data.classes == ("cat", "dog")
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.x_train[4, 2, 3].tolist() == [101, 0, 154]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "validation"), ("train", "Test"), ("TRAIN", "Valid")],
)
def test_parts_have_their_usual_names_in_any_case(tmp_path, train, test):
    for part, count in ((train, 3), (test, 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(tmp_path / part / name / f"{i}.png", 100 * c + i)
    data = load(tmp_path)
    assert (data.classes, len(data.x_train), len(data.x_test)) == (("cat", "dog"), 6, 4)


@pytest.mark.parametrize("parts", [("test",), ("Val", "cat"), ("train", "Train", "test")])
def test_parts_that_do_not_fit_together_are_no_classes(tmp_path, parts):
    for part in parts:
        paint(tmp_path / part / "dog" / "0.png", 0)
    with pytest.raises(ValueError, match=r"folders of classes in .*one train/ and one test/"):
        load(tmp_path)


def test_folders_of_folders_alone_are_no_classes(tmp_path):
    for part in ("first", "second"):
        for i in range(5):
            paint(tmp_path / part / "dog" / f"{i}.png", 0)
    with pytest.raises(ValueError, match=r"first, second .* folders, no images.* name them train/"):
        load(tmp_path)
    paint(tmp_path / "second" / "6.png", 0)  # folders beside images are of one class
    assert load(tmp_path).classes == ("first", "second")


def test_a_class_without_a_folder_in_the_test_part_is_named(two_parts):
    shutil.rmtree(two_parts / "val" / "dog")
    with pytest.raises(ValueError, match=r"val lacks the class dog, .* remove .*train.dog"):
        load(two_parts)


def test_a_folder_of_classes_is_split_by_a_seed(tmp_path):
    for c, name in enumerate(("a", "train")):  # a class may be called train
        for i in range(10):
            paint(tmp_path / name / f"{i}.bmp", 100 * c + i)
    first, again, other = (load(tmp_path, seed=s) for s in (0, 0, 3))
    assert first.classes == ("a", "train")
    assert len(first.x_train) == 16
    assert np.bincount(first.y_test).tolist() == [2, 2]
    np.testing.assert_array_equal(first.x_test, again.x_test)
    assert (first.x_test != other.x_test).any()


def test_images_are_scaled_to_cover_the_size_and_cropped_at_the_centre(tmp_path):
    # 8 wide, 4 high, black | white | white | black in pairs of columns: the centre is white
    columns = np.repeat(np.array([0, 255, 255, 0], "uint8"), 2)
    for name in "ab":
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.tile(columns, (4, 1))).save(tmp_path / name / f"{i}.png")
    data = load(tmp_path, size=4, channels=1)
    assert data.image_shape == (4, 4, 1)
    assert (data.x_train == 255).all()


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    np.testing.assert_array_equal(load(tmp_path, size=(5, 7)).x_train[0], pixels)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    paint(tmp_path / "a" / "0.png", 7, mode="L")
    palette = Image.new("P", (6, 5), 0)
    palette.putpalette([9, 8, 7])
    palette.save(tmp_path / "a" / "1.png", transparency=b"\x80")
    data = load(tmp_path)
    seen = {tuple(image[0, 0].tolist()) for image in (data.x_train[0], data.x_test[0])}
    assert seen == {(7, 7, 7), (9, 8, 7)}


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_of_grey_are_scaled_to_8(tmp_path, channels):
    # 257 = 65535 / 255: each of 256 values has its own, and what lies between goes to the nearest.
    wide = np.array([[0, 257, 128, 129, 65535, 200 * 257]], "uint16")
    Image.fromarray(wide).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", (1, 6), channels)
    for channel in range(channels):
        np.testing.assert_array_equal(found[..., channel], [[0, 1, 0, 1, 255, 200]])


def test_an_unreadable_image_is_named(two_parts):
    bad = two_parts / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"dog.1\.png cannot be read as an image"):
        load(two_parts)
    with pytest.raises(ValueError, match=r"dog.1\.png cannot be read as an image"):
        load(two_parts, size=4)


def test_an_image_of_another_size_is_named(two_parts):
    paint(two_parts / "val" / "dog" / "1.png", 0, size=(7, 5))
    with pytest.raises(ValueError, match=r"dog.1\.png has 5x7 pixels .* has 5x6\. Pass size="):
        load(two_parts)
    assert load(two_parts, size=(5, 6)).image_shape == (5, 6, 3)


def test_folders_without_images_are_named(two_parts, tmp_path_factory):
    with pytest.raises(ValueError, match="has no folders in it"):
        load(tmp_path_factory.mktemp("bare"))
    for file in (two_parts / "train" / "dog").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"train.dog has no images in it\. Looked for \.bmp"):
        load(two_parts)


def test_a_class_of_the_test_part_alone_is_named(two_parts):
    paint(two_parts / "val" / "emu" / "0.png", 0)
    with pytest.raises(ValueError, match=r"val has classes .* lacks: emu\. Known: cat, dog"):
        load(two_parts)


@pytest.mark.parametrize("size", [0, (3,), (4, -1), (4, 4.5)])
def test_a_size_that_is_none_is_refused(two_parts, size):
    with pytest.raises(ValueError, match=re.escape(f"Got {size}")):
        load(two_parts, size=size)


def test_two_channels_are_refused(two_parts):
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\)\. Got 2"):
        load(two_parts, channels=2)


def test_without_pillow_the_error_says_what_to_install(two_parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    said = (
        "Folders of images are read with Pillow, which is not installed: "
        "pip install keras-lowbit[images]"
    )
    for size in (None, 4):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            load(two_parts, size=size)


def test_the_bar_goes_on_as_images_are_read(two_parts, monkeypatch):
    seen = []

    def track(files, description):
        for file in files:
            seen.append(description)
            yield file

    def read(file, *_):
        seen.append("read")
        return read_image(file, *_)

    monkeypatch.setattr(folder, "progress", types.SimpleNamespace(track=track))
    monkeypatch.setattr(folder, "read_image", read)
    data = load(two_parts, size=4)
    assert seen == ["reading images", "read"] * (len(data.x_train) + len(data.x_test))


def test_a_large_folder_is_read_on_demand_and_gives_the_same_pixels(two_parts):
    eager = read_folder(two_parts)
    lazy = read_folder(two_parts, memory_limit=0)
    assert isinstance(lazy.x_train, LazyImages)
    assert lazy.x_train.shape == eager.x_train.shape
    np.testing.assert_array_equal(lazy.x_train[:], eager.x_train)
    np.testing.assert_array_equal(lazy.x_train[np.array([4, 1])], eager.x_train[[4, 1]])
    np.testing.assert_array_equal(lazy.x_train[-1], eager.x_train[-1])
    np.testing.assert_array_equal(holdout(lazy, 2).x_test[:], holdout(eager, 2).x_test)
