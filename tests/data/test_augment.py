import keras
import numpy as np
import pytest
from keras import ops

import tflite_export
from keras_lowbit import calibrate, quantize_model
from keras_lowbit.data import AugmentedBatches, Batches, RandomCropFlip, crop_flip
from keras_lowbit.data.batches import crop_flip_numpy
from keras_lowbit.integer.graph import dump


def images(n=10, shape=(5, 7, 2), dtype="uint8"):
    return np.random.default_rng(0).integers(1, 256, (n, *shape)).astype(dtype)


ROW = np.array([[[[1], [2], [3]]]], "uint8")  # one image, 1 x 3 pixels


@pytest.mark.parametrize(
    ("top", "left", "flipped", "expected"),
    [
        (1, 1, False, [1, 2, 3]),  # no shift
        (1, 0, False, [0, 1, 2]),
        (1, 2, False, [2, 3, 0]),
        (1, 1, True, [3, 2, 1]),
        (1, 2, True, [0, 3, 2]),  # crop, then mirror
        (0, 1, False, [0, 0, 0]),  # the row above the image
    ],
)
def test_crop_and_flip_by_hand(top, left, flipped, expected):
    place = (np.array([top], "int32"), np.array([left], "int32"), np.array([flipped]))
    assert crop_flip_numpy(ROW, *place, pad=1).ravel().tolist() == expected
    graph = crop_flip(ops.convert_to_tensor(ROW), *map(ops.convert_to_tensor, place), pad=1)
    assert ops.convert_to_numpy(graph).ravel().tolist() == expected


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_graph_form_equals_the_numpy_form(dtype):
    rng = np.random.default_rng(1)
    x = images(20, dtype=dtype)
    place = (*rng.integers(0, 7, (2, 20)).astype("int32"), rng.integers(0, 2, 20) == 1)
    graph = crop_flip(ops.convert_to_tensor(x), *map(ops.convert_to_tensor, place), pad=3)
    assert keras.backend.standardize_dtype(graph.dtype) == dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(graph), crop_flip_numpy(x, *place, pad=3))


def is_crop(image, original, pad, flip):
    padded = np.pad(original, ((pad, pad), (pad, pad), (0, 0)))
    height, width = original.shape[:2]
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[top : top + height, left : left + width]
            if (crop == image).all() or (flip and (crop[:, ::-1] == image).all()):
                return True
    return False


def test_the_layer_crops_in_training_and_does_nothing_else():
    x = images(12)
    layer = RandomCropFlip(pad=2, seed=3)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), x)
    first, second = (ops.convert_to_numpy(layer(x, training=True)) for _ in range(2))
    assert first.dtype == "uint8"
    assert (first != second).any()
    assert all(is_crop(image, original, 2, True) for image, original in zip(first, x, strict=True))


def test_the_layer_can_do_without_flips():
    x = images(12)
    out = ops.convert_to_numpy(RandomCropFlip(pad=1, flip=False)(x, training=True))
    assert all(is_crop(image, original, 1, False) for image, original in zip(out, x, strict=True))


def tiny_model(layer=None, jit_compile="auto"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5, 7, 2)),
            *([layer] if layer else []),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=jit_compile)
    return model


def test_the_layer_trains_in_a_compiled_graph_with_a_smaller_last_batch():
    x, y = images(10), np.arange(10) % 3
    model = tiny_model(RandomCropFlip(pad=2))
    before = ops.convert_to_numpy(model.layers[0].seed_generator.state).copy()
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert (ops.convert_to_numpy(model.layers[0].seed_generator.state) != before).any()


def test_the_layer_goes_on_with_its_crops_after_a_checkpoint(tmp_path):
    x = images(6)
    model = tiny_model(RandomCropFlip(pad=2, seed=1))
    model(x, training=True)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    outs = [ops.convert_to_numpy(m.layers[0](x, training=True)) for m in (model, loaded)]
    np.testing.assert_array_equal(*outs)
    fresh = ops.convert_to_numpy(RandomCropFlip(pad=2, seed=1)(x, training=True))
    assert (outs[0] != fresh).any()


@pytest.mark.parametrize(
    "make", [RandomCropFlip, lambda pad: AugmentedBatches(images(), range(10), pad=pad)]
)
def test_a_negative_pad_is_refused(make):
    with pytest.raises(ValueError, match=r"pad.* must be .* at least 0\. Got -1"):
        make(pad=-1)


def test_a_model_that_crops_and_flips_is_exported_as_if_it_did_not():
    def net(*augment):
        keras.utils.clear_session(free_memory=False)  # the same names
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((6, 5, 3))
        for layer in (*augment, keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3)):
            x = layer(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(2)(x))

    assert tflite_export.check(net(RandomCropFlip(pad=1))) == []
    pixels = images(8, (6, 5, 3)).astype("float32")
    plain, cropping = (
        calibrate(quantize_model(net(*a)), pixels) for a in ((), (RandomCropFlip(),))
    )
    result = tflite_export.convert(cropping)
    assert dump(result.graph) == dump(tflite_export.convert(plain).graph)
    moved = ops.convert_to_numpy(cropping(pixels, training=True))
    assert np.abs(moved - ops.convert_to_numpy(cropping(pixels))).max() > 1e-3


def test_batches_cover_the_images_in_order():
    x, y = images(10), np.arange(10)
    batches = Batches(x, y, 4)
    assert len(batches) == 3
    np.testing.assert_array_equal(np.concatenate([b for b, _ in batches]), x)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]


def test_augmented_batches_hold_every_image_once_an_epoch_with_its_label():
    x, y = images(10), np.arange(10)
    batches = AugmentedBatches(x, y, 4, pad=2)
    seen = []
    for crops, labels in batches:
        assert crops.dtype == "uint8"
        seen += labels.tolist()
        assert all(is_crop(c, x[k], 2, True) for c, k in zip(crops, labels, strict=True))
    assert sorted(seen) == list(range(10))
    assert seen != list(range(10))


def test_without_pad_and_flip_images_are_only_shuffled():
    x, y = images(10), np.arange(10)
    for crops, labels in AugmentedBatches(x, y, 4, pad=0, flip=False):
        np.testing.assert_array_equal(crops, x[labels])


def epoch_of(batches, epoch):
    batches.epoch = epoch
    return [np.concatenate(part) for part in zip(*batches, strict=True)]


def test_a_batch_depends_on_seed_epoch_and_index_only():
    x, y = images(10), np.arange(10)
    first, again = AugmentedBatches(x, y, 4, seed=5), AugmentedBatches(x, y, 4, seed=5)
    other = AugmentedBatches(x, y, 4, seed=6)
    epoch_of(first, 0)
    epoch_of(first, 1)
    for a, b in zip(epoch_of(first, 7), epoch_of(again, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (epoch_of(first, 7)[0] != epoch_of(first, 8)[0]).any()
    assert (epoch_of(first, 7)[0] != epoch_of(other, 7)[0]).any()
    first.epoch = 7
    np.testing.assert_array_equal(first[2][0], epoch_of(again, 7)[0][8:])


def test_an_image_moves_differently_from_epoch_to_epoch():
    batches = AugmentedBatches(images(1), [0], 1, pad=2)
    assert len({epoch_of(batches, epoch)[0].tobytes() for epoch in range(10)}) > 5


def test_drop_remainder_leaves_one_batch_shape():
    batches = AugmentedBatches(images(10), np.arange(10), 4, drop_remainder=True)
    assert [len(labels) for _, labels in batches] == [4, 4]
    with pytest.raises(ValueError, match="10 images make no batch of 16"):
        AugmentedBatches(images(10), np.arange(10), 16, drop_remainder=True)


class Recorder(AugmentedBatches):
    """Remembers which batches of which epoch were asked for."""

    def __init__(self, *args, **kwargs):
        self.asked = []
        super().__init__(*args, **kwargs)

    def __getitem__(self, index):
        self.asked.append((self.epoch, index))
        return super().__getitem__(index)


def test_fit_moves_to_the_next_epoch_by_itself():
    batches = Recorder(images(10), np.arange(10) % 3, 4)
    model = tiny_model()
    model.fit(batches, epochs=3, verbose=0)
    epochs = {epoch for epoch, index in batches.asked if index == 2}
    assert len(epochs) >= 3


def test_fit_gets_the_batches_in_order_however_it_shuffles_the_indices():
    y = np.arange(10)
    batches = AugmentedBatches(images(10), y, 4)
    plain = [labels.tolist() for _, labels in batches]
    batches.on_epoch_begin()
    assert [batches[i][1].tolist() for i in (2, 0, 1)] == plain
    assert batches[2][1].tolist() == plain[0]
    batches.on_epoch_end()
    batches.epoch = 0
    assert batches[2][1].tolist() == plain[2]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(jit_compile, backend):
    if backend == "torch" and jit_compile:
        pytest.skip("torch.compile needs a compiler and minutes")
    x, y = images(10), np.arange(10) % 3

    def batches():
        data = AugmentedBatches(x, y, 4, seed=2, pad=2)
        return data, [data.follow_epochs()]

    data, callbacks = batches()
    whole = tiny_model(jit_compile=jit_compile)
    whole.fit(data, epochs=4, callbacks=callbacks, verbose=0)

    data, callbacks = batches()
    first = tiny_model(jit_compile=jit_compile)
    first.fit(data, epochs=2, callbacks=callbacks, verbose=0)
    data, callbacks = batches()
    second = tiny_model(jit_compile=jit_compile)
    second.set_weights(first.get_weights())
    second.fit(data, initial_epoch=2, epochs=4, callbacks=callbacks, verbose=0)
    for a, b in zip(whole.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_refuse_lengths_that_differ_and_no_images():
    with pytest.raises(ValueError, match=r"one common length above 0\. Got 10 and 9"):
        Batches(images(10), range(9))
    with pytest.raises(ValueError, match=r"one common length above 0\. Got 0 and 0"):
        Batches(images(0), [])
    with pytest.raises(ValueError, match=r"batch_size must be .* of at least 1\. Got 0"):
        Batches(images(10), range(10), 0)


def test_a_look_amid_a_pass_takes_no_place_in_it():
    """As batch-norm re-estimation at the start of an epoch does."""
    batches = AugmentedBatches(images(12), np.arange(12), 4)
    expected = [batches[i][1].tolist() for i in range(3)]
    batches.on_epoch_begin()
    assert batches.batch_at(0)[1].tolist() == expected[0]
    assert [batches[i][1].tolist() for i in (2, 0, 1)] == expected


@pytest.mark.parametrize("options", [{"pad": 2.5}, {"batch_size": 2.5}, {"cutout": 1.5}])
def test_halves_of_pixels_and_images_are_refused(options):
    with pytest.raises(ValueError, match="must be a whole number"):
        AugmentedBatches(images(10), range(10), **options)
