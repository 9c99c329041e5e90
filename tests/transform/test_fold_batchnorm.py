import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.transform.fold_batchnorm import Declined, fold_batchnorm

K = keras.layers
RANDOM = np.random.default_rng(3)
IMAGES = RANDOM.normal(size=(4, 7, 5, 3)).astype("float32")


def hostile(model):
    """Random statistics with negative and zero gammas, in nested models too."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            hostile(layer)
        elif isinstance(layer, K.BatchNormalization):
            n = layer.moving_mean.shape[0]
            layer.moving_mean.assign(RANDOM.normal(size=n))
            layer.moving_variance.assign(RANDOM.uniform(0.01, 2, size=n))
            if layer.scale:
                gamma = RANDOM.normal(size=n)
                gamma[0] = 0
                layer.gamma.assign(gamma)
            if layer.center:
                layer.beta.assign(RANDOM.normal(size=n))
    return model


def norms(model):
    return [layer for layer in model.layers if isinstance(layer, K.BatchNormalization)]


def outputs(model, *feeds):
    return [ops.convert_to_numpy(t) for t in keras.tree.flatten(model(*feeds, training=False))]


def assert_same(model, folded, feeds=IMAGES):
    for before, after in zip(outputs(model, feeds), outputs(folded, feeds), strict=True):
        # Float32 sums of kernels that were multiplied by the norms' gains first.
        np.testing.assert_allclose(after, before, atol=1e-5 * max(1, np.abs(before).max()))


def test_all_kinds_are_folded_and_outputs_stay():
    x = inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(6, 3, strides=2, padding="same", use_bias=False, name="conv")(x)
    x = K.ReLU()(K.BatchNormalization(name="bn1")(x))
    x = K.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="dw")(x)
    x = K.ReLU()(K.BatchNormalization(scale=False, name="bn2")(x))
    x = K.Conv2D(4, 1, groups=2, name="grouped")(x)
    x = K.BatchNormalization(center=False, name="bn3")(x)
    x = K.Dense(5, use_bias=False, name="dense")(K.Flatten()(x))
    model = hostile(keras.Model(inputs, K.BatchNormalization(name="bn4")(x), name="m"))
    before = [w.copy() for w in model.get_weights()]
    folded, report = fold_batchnorm(model, return_report=True)
    assert report.folded == {"bn1": "conv", "bn2": "dw", "bn3": "grouped", "bn4": "dense"}
    assert report.declined == ()
    assert norms(folded) == []
    assert folded.name == "m_folded"
    assert_same(model, folded)
    # The model given stays as it is.
    assert len(norms(model)) == 4
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_fold_worked_by_hand():
    # gain = 3 / sqrt(3.999 + 0.001) = 1.5; kernel 2 -> 3; bias (1 - 5) * 1.5 + 0.25 = -5.75
    model = keras.Sequential(
        [keras.Input((1,)), K.Dense(1, name="d"), K.BatchNormalization(epsilon=0.001)]
    )
    model.layers[0].set_weights([np.array([[2.0]]), np.array([1.0])])
    model.layers[1].set_weights([np.array([v]) for v in (3.0, 0.25, 5.0, 3.999)])
    kernel, bias = fold_batchnorm(model).get_layer("d").get_weights()
    np.testing.assert_allclose(kernel, [[3.0]], rtol=1e-6)  # float32
    np.testing.assert_allclose(bias, [-5.75], rtol=1e-6)  # float32


def test_nested_models_are_opened():
    inner = keras.Sequential(
        [keras.Input((7, 5, 3)), K.Conv2D(4, 3, name="c"), K.BatchNormalization(name="b")],
        name="backbone",
    )
    inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(2, 1, name="c")(inner(inputs))
    model = hostile(keras.Model(inputs, K.BatchNormalization(name="b")(x)))
    folded, report = fold_batchnorm(model, return_report=True)
    assert report.folded == {"backbone/b": "backbone/c", "b": "c"}
    assert [layer.name for layer in folded.layers[1:]] == ["backbone_c", "c"]
    assert_same(model, folded)


def test_operations_and_output_structures_are_kept():
    inputs = keras.Input((7, 5, 3))
    x = K.BatchNormalization()(K.Conv2D(4, 3, padding="same", name="c")(inputs))
    short = ops.pad(x[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (2, 2)])
    model = hostile(keras.Model(inputs, {"a": ops.relu(x) + 1.0, "b": [short, x]}))
    folded = fold_batchnorm(model)
    assert norms(folded) == []
    assert set(folded(IMAGES)) == {"a", "b"}
    assert_same(model, folded)


def test_several_inputs_are_kept():
    first, second = keras.Input((4, 4, 3), name="one"), keras.Input((4, 4, 3), name="two")
    x = K.BatchNormalization()(K.Conv2D(2, 1)(first))
    model = hostile(keras.Model([first, second], K.Concatenate()([x, second])))
    feeds = [RANDOM.normal(size=(2, 4, 4, 3)).astype("float32") for _ in range(2)]
    assert_same(model, fold_batchnorm(model), feeds)


def declined(build):
    inputs = keras.Input((7, 5, 3), name="image")
    model = hostile(keras.Model(inputs, build(inputs)))
    folded, report = fold_batchnorm(model, return_report=True)
    assert_same(model, folded)
    assert len(norms(folded)) == len({d.batch_norm for d in report.declined}) or report.folded
    return list(report.declined)


def test_a_second_reader_declines():
    def build(x):
        x = K.Conv2D(3, 1, name="c")(x)
        return K.Add(name="sum")([K.BatchNormalization(name="b")(x), x])

    assert declined(build) == [Declined("b", "the output of c is also read by sum")]


def test_a_model_output_in_front_declines():
    def build(x):
        x = K.Conv2D(3, 1, name="c")(x)
        return [K.BatchNormalization(name="b")(x), x]

    assert declined(build) == [Declined("b", "the output of c is an output of the model")]


def test_an_activation_between_declines():
    def build(x):
        return K.BatchNormalization(name="b")(K.Conv2D(3, 1, activation="relu", name="c")(x))

    assert declined(build) == [Declined("b", "activation 'relu' of c stands between")]


def test_a_layer_without_kernel_in_front_declines():
    def build(x):
        return K.BatchNormalization(name="b")(K.ReLU(name="r")(K.Conv2D(3, 1)(x)))

    why = "it reads r (ReLU); foldable are Conv2D, DepthwiseConv2D, Dense"
    assert declined(build) == [Declined("b", why)]


def test_the_input_in_front_declines():
    assert declined(lambda x: K.BatchNormalization(name="b")(x)) == [
        Declined("b", "it reads an input of the model")
    ]


def test_shared_layers_decline():
    conv = K.Conv2D(3, 1, name="c")

    def build(x):
        first = K.BatchNormalization(name="b1")(conv(x))
        return [first, K.BatchNormalization(name="b2")(conv(ops.relu(x)))]

    found = sorted(declined(build), key=lambda d: d.batch_norm)
    assert found == [Declined(b, "c is called 2 times") for b in ("b1", "b2")]


def test_another_axis_declines():
    def build(x):
        return K.BatchNormalization(axis=1, name="b")(K.Conv2D(3, 1, name="c")(x))

    why = "it runs over axis 1, not over the channels of c"
    assert declined(build) == [Declined("b", why)]


def test_training_statistics_decline():
    inputs = keras.Input((7, 5, 3))
    x = K.BatchNormalization(name="b")(K.Conv2D(3, 1, name="c")(inputs), training=True)
    _, report = fold_batchnorm(keras.Model(inputs, x), return_report=True)
    assert report.declined == (Declined("b", "it is called with training=True"),)


def test_quantized_layers_keep_their_batch_norm():
    from keras_lowbit.transform import quantize_model

    inputs = keras.Input((7, 5, 3))
    x = K.BatchNormalization(name="b")(K.Conv2D(3, 1, name="c")(inputs))
    model = quantize_model(keras.Model(inputs, x), "w4a4")
    _, report = fold_batchnorm(model, return_report=True)
    why = "it reads c (QuantizedConv2D); foldable are Conv2D, DepthwiseConv2D, Dense"
    assert report.declined == (Declined("b", why),)


def test_a_folded_model_trains_saves_and_quantizes(tmp_path):
    from keras_lowbit.transform import quantize_model

    inputs = keras.Input((7, 5, 3))
    x = K.BatchNormalization()(K.Conv2D(3, 1, name="c")(inputs))
    folded = fold_batchnorm(hostile(keras.Model(inputs, x)))
    folded.save(tmp_path / "m.keras")
    assert_same(folded, keras.models.load_model(tmp_path / "m.keras"))
    assert quantize_model(folded, "w8a8").get_layer("c").use_bias


def test_a_model_without_a_graph_is_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="has no graph to read"):
        fold_batchnorm(Own(name="own"))


def test_a_folded_layer_is_not_pressed_into_constraints_of_the_kernel_before(tmp_path):
    inputs = keras.Input((7, 5, 3))
    x = K.Conv2D(3, 1, kernel_constraint="unit_norm", bias_constraint="non_neg", name="c")(inputs)
    folded = fold_batchnorm(hostile(keras.Model(inputs, K.BatchNormalization()(x))))
    layer = folded.get_layer("c")
    assert (layer.kernel_constraint, layer.bias_constraint) == (None, None)
    before = folded.get_weights()
    folded.compile(keras.optimizers.SGD(1e-12), "mse")
    folded.fit(np.ones((1, 7, 5, 3)), np.zeros((1, 7, 5, 3)), verbose=0)
    for old, new in zip(before, folded.get_weights(), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)  # float32
