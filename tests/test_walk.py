import keras
import numpy as np
import pytest
from keras import ops

import keras_lowbit as klb
import tflite_export
from keras_lowbit import walk
from keras_lowbit.walk import Ref

K = keras.layers
IMAGES = np.random.default_rng(1).normal(size=(3, 6, 5, 3)).astype("float32")


def names(model):
    return [call.name for call in walk.flatten(model).calls]


def replayed(model, *feeds):
    """The model's outputs when its program is interpreted call by call."""
    program = walk.flatten(model)
    values = walk.run(program, feeds, lambda call, args, kwargs: call.operation(*args, **kwargs))
    return walk.substitute(program.outputs, values)


def assert_replays(model, *feeds):
    expected = model(list(feeds) if len(feeds) > 1 else feeds[0])
    made = replayed(model, *[ops.convert_to_tensor(f) for f in feeds])
    keras.tree.assert_same_structure(expected, made)
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(made), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_calls_come_in_execution_order():
    x = inputs = keras.Input((6, 5, 3))
    x = K.Conv2D(4, 3, name="conv")(x)
    y = K.ReLU(name="relu")(x)
    model = keras.Model(inputs, K.Add(name="add")([x, y]))
    assert names(model) == ["conv", "relu", "add"]
    assert_replays(model, IMAGES)


@pytest.mark.parametrize("called", [False, True])
def test_a_sequential_model_needs_no_call_before(called):
    model = keras.Sequential([keras.Input((6, 5, 3)), K.Conv2D(2, 3, name="a"), K.ReLU(name="b")])
    if called:
        model(IMAGES)
    assert names(model) == ["a", "b"]
    assert_replays(model, IMAGES)


def test_nested_models_are_opened_and_named_by_their_path():
    deepest = keras.Sequential([keras.Input((6, 5, 4)), K.ReLU(name="act")], name="deepest")
    inner_in = keras.Input((6, 5, 3))
    inner = keras.Model(inner_in, deepest(K.Conv2D(4, 1, name="conv")(inner_in)), name="inner")
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, K.Flatten(name="flat")(inner(inputs)))
    assert names(model) == ["inner/conv", "inner/deepest/act", "flat"]
    assert_replays(model, IMAGES)


def test_a_nested_model_may_have_a_dot_in_its_name():
    """As `keras.applications` names its own; PyTorch takes no parameter with one."""
    image = keras.Input((6, 5, 3))
    inner = keras.Model(image, K.Conv2D(4, 3, name="conv")(image), name="net_1.00")
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, K.Dense(2)(K.Flatten()(inner(inputs))))
    conv = walk.flatten(model).calls[0]
    assert (conv.name, conv.plain) == ("net_1.00/conv", "net_1_00_conv")
    assert tflite_export.check(model) == []
    small = klb.quantize_model(model, klb.Scheme(exceptions={"net_1.00/*": "w4a8"}))
    assert small.get_layer("net_1_00_conv").kernel_quantizer.bits == 4


def test_a_nested_model_called_twice_gives_its_calls_twice():
    inner = keras.Sequential([keras.Input((6, 5, 3)), K.Conv2D(3, 1, name="c")], name="inner")
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, inner(ops.relu(inner(inputs))))
    calls = [c for c in walk.flatten(model).calls if c.name == "inner/c"]
    assert len(calls) == 2
    assert calls[0].operation is calls[1].operation
    assert calls[0].output.index != calls[1].output.index
    assert_replays(model, IMAGES)


def test_a_layer_called_twice_gives_two_calls_of_one_operation():
    conv = K.Conv2D(3, 1, name="c")
    inputs = keras.Input((6, 5, 3))
    model = keras.Model(inputs, conv(conv(inputs)))
    first, second = walk.flatten(model).calls
    assert first.operation is second.operation is conv
    assert second.inputs == [first.output]
    assert_replays(model, IMAGES)


def test_operations_and_constants_are_kept():
    inputs = keras.Input((6, 5, 3))
    x = ops.pad(inputs[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (1, 1)])
    model = keras.Model(inputs, ops.add(x, 2.0) * x)
    kinds = [type(call.operation).__name__ for call in walk.flatten(model).calls]
    assert kinds == ["GetItem", "Pad", "Add", "Multiply"]
    add = walk.flatten(model).calls[2]
    assert len(add.inputs) == 1
    assert 2.0 in add.args
    assert_replays(model, IMAGES)


def test_several_inputs_and_a_structure_of_outputs():
    one, two = keras.Input((4,), name="one"), keras.Input((4,), name="two")
    total = K.Add(name="sum")([one, two])
    model = keras.Model([one, two], {"sum": total, "more": [one, K.Dense(2, name="d")(total)]})
    program = walk.flatten(model)
    assert program.input_names == ("one", "two")
    assert program.outputs["more"][0] == program.inputs[0]
    feeds = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    assert_replays(model, *feeds)


def test_layers_with_several_outputs_are_replayed():
    class Halves(K.Layer):
        def call(self, x):
            return x[..., :2], x[..., 2:]

        def compute_output_shape(self, shape):
            return (*shape[:-1], 2), (*shape[:-1], shape[-1] - 2)

    inputs = keras.Input((5,))
    a, b = Halves(name="halves")(inputs)
    model = keras.Model(inputs, [b, a])
    (call,) = walk.flatten(model).calls
    assert [r.shape for r in walk.refs(call.outputs)] == [(None, 2), (None, 3)]
    with pytest.raises(ValueError, match=r"halves: expected one output\. Got 2"):
        _ = call.output
    assert_replays(model, np.ones((2, 5), "float32"))


def test_readers_count_a_call_once_and_producers_know_no_inputs():
    inputs = keras.Input((4,))
    x = K.Dense(4, name="d")(inputs)
    model = keras.Model(inputs, [K.Add(name="twice")([x, x]), K.ReLU(name="r")(x)])
    program = walk.flatten(model)
    made = program.calls[0].output.index
    assert sorted(c.name for c in program.readers()[made]) == ["r", "twice"]
    assert program.producers()[made].name == "d"
    assert program.inputs[0].index not in program.producers()


def test_refs_and_substitute_walk_structures():
    a, b = Ref(0, (None,), "float32"), Ref(1, (None,), "float32")
    structure = ([a, 3], {"k": b})
    assert walk.refs(structure) == [a, b]
    assert walk.substitute(structure, {0: "x", 1: "y"}) == (["x", 3], {"k": "y"})


def test_models_without_a_graph_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"own \(Own\) has no graph to read"):
        walk.flatten(Own(name="own"))
    with pytest.raises(ValueError, match="empty: the Sequential model has no input shape yet"):
        walk.flatten(keras.Sequential([K.Dense(2)], name="empty"))


@pytest.mark.once
@pytest.mark.parametrize(
    "reads",
    [
        klb.quantize_model,
        klb.fold_batchnorm,
        klb.freeze,
        klb.summary,
        tflite_export.check,
        tflite_export.convert,
        lambda model: klb.save_packed(model, "model.keras"),
    ],
)
@pytest.mark.parametrize("given", [None, "float.keras"])
def test_what_is_no_model_is_named(reads, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = type(given).__name__
    with pytest.raises(ValueError, match=rf"Expected a Keras model\. Got {given!r} \({kind}\)"):
        reads(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inner_of", ["list", "dict"])
def test_a_nested_model_called_with_a_dict_reads_it_by_name(inner_of):
    """The keys sort as a, b; the inputs are b, a."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inputs = [b, a] if inner_of == "list" else {"b": b, "a": a}
    inner = keras.Model(inputs, ops.subtract(ops.multiply(a, 2.0), b), name="inner")
    p, r = keras.Input((4,), name="p"), keras.Input((4,), name="r")
    model = keras.Model([p, r], inner({"a": p, "b": r}))
    ones, threes = np.ones((2, 4), "float32"), np.full((2, 4), 3.0, "float32")
    assert_replays(model, ones, threes)
    made = replayed(model, ops.convert_to_tensor(ones), ops.convert_to_tensor(threes))
    np.testing.assert_array_equal(ops.convert_to_numpy(made), -1.0)  # 2 * 1 - 3


def test_inputs_are_named_after_their_layers():
    keras.Input((3,))
    one, two = keras.Input((4,)), keras.Input((4,), name="two")
    model = keras.Model([one, two], K.Add()([K.ReLU()(one), two]))
    assert walk.flatten(model).input_names == ("input_layer_1", "two")


def test_a_forward_pass_keeps_nothing_for_gradients():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    program = walk.flatten(model)
    x = np.ones((2, 4), "float32")
    values = walk.forward(program, [ops.convert_to_tensor(x)])
    (found,) = values.values()
    assert not getattr(found, "requires_grad", False)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(found), ops.convert_to_numpy(model(x, training=False))
    )
