"""The frozen model: the codes of the reference in every tensor, and the graph back again."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.integer import frozen, reference
from keras_lowbit.integer import graph as ir


class Net:
    """Writes graphs by hand: an operation a line, random constants, plausible grids."""

    def __init__(self, seed, **inputs):
        self.rng = np.random.default_rng(seed)
        self.tensors = {
            name: ir.Tensor(name, shape, dtype) for name, (shape, dtype) in inputs.items()
        }
        self.inputs, self.ops = tuple(inputs), []

    def add(self, cls, name, sources, shape, scale=0.05, zero_point=0, dtype="int8", **attributes):
        self.tensors[name] = ir.Tensor(name, (1, *shape), dtype, scale, zero_point)
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        self.ops.append(cls(sources, name, source=f"layer of {name}", **attributes))
        return name

    def same_grid(self, cls, name, sources, shape, **attributes):
        first = self.tensors[sources if isinstance(sources, str) else sources[0]]
        grid = {"scale": first.scale, "zero_point": first.zero_point}
        return self.add(cls, name, sources, shape, **grid, **attributes)

    def product(self, cls, name, source, shape, kernel, bits=8, **attributes):
        """A product whose sums, spread by a random kernel, fill the output's codes."""
        top = 2 ** (bits - 1) - 1
        codes = self.rng.integers(-top, top + 1, kernel).astype(np.int8)
        depthwise = cls is ir.DepthwiseConv2D
        channels = np.prod(kernel[2:]) if depthwise else kernel[-1]
        spread = 70 * np.sqrt(codes.size / channels) * top / 2
        scale = attributes.pop("scale", 0.05)
        unit = 40 * scale / spread / self.tensors[source].scale
        return self.add(
            cls,
            name,
            source,
            shape,
            scale,
            kernel=codes,
            kernel_scale=(unit * self.rng.uniform(0.5, 2, channels)).astype(np.float32),
            bias=self.rng.integers(-spread, spread, channels).astype(np.int32),
            kernel_bits=bits,
            **attributes,
        )

    def graph(self, *outputs):
        return ir.Graph(self.tensors, tuple(self.ops), self.inputs, outputs)


def residual_net(seed):
    """Every kind of operation, float ends, strides on odd sizes, dilation, groups, two heads."""
    net = Net(seed, image=((1, 13, 11, 3), "float32"))
    net.add(ir.Quantize, "q", "image", (13, 11, 3), 1 / 64, -5)
    relu6 = {"activation": "relu6", "scale": 6 / 255, "zero_point": -128}
    conv, depthwise = ir.Conv2D, ir.DepthwiseConv2D
    net.product(conv, "stem", "q", (7, 6, 8), (3, 3, 3, 8), strides=(2, 2), padding="SAME", **relu6)
    net.product(depthwise, "dw", "stem", (7, 6, 16), (3, 3, 8, 2), 2, padding="SAME", **relu6)
    net.product(conv, "linear", "dw", (7, 6, 8), (1, 1, 16, 8), 4, scale=0.03, zero_point=9)
    net.add(ir.Add, "sum", ("stem", "linear"), (7, 6, 8), 0.07, -20)
    net.add(ir.Multiply, "product", ("sum", "stem"), (7, 6, 8), 0.2, 7, activation="relu")
    clip = {"activation": "relu_n1_to_1"}
    net.add(ir.Add, "low", ("sum", "linear"), (7, 6, 8), 1 / 7, 3, **clip)
    net.same_grid(ir.Pad, "padded", "low", (9, 7, 8), paddings=((0, 0), (1, 1), (0, 1), (0, 0)))
    net.product(conv, "grouped", "padded", (4, 3, 8), (3, 3, 2, 8), 4, strides=(2, 2), scale=0.05)
    net.product(
        conv,
        "dilated",
        "grouped",
        (4, 3, 8),
        (3, 3, 8, 8),
        dilation=(2, 2),
        padding="SAME",
        activation="relu",
    )
    net.same_grid(
        ir.MaxPool2D, "pooled", "dilated", (2, 2, 8), pool=(3, 3), strides=(2, 2), padding="SAME"
    )
    net.same_grid(
        ir.MaxPool2D, "skipped", "grouped", (2, 2, 8), pool=(1, 1), strides=(2, 2), padding="SAME"
    )
    net.same_grid(ir.Concatenate, "both", ("pooled", "skipped"), (2, 2, 16), axis=3)
    net.same_grid(ir.ResizeNearest, "larger", "both", (4, 6, 16), factors=(2, 3))
    net.same_grid(ir.Slice, "inside", "larger", (2, 5, 7), begin=(0, 1, 1, 4))
    net.same_grid(ir.Transpose, "turned", "inside", (7, 2, 5), order=(0, 3, 1, 2))
    net.same_grid(ir.AveragePool2D, "mean", "both", (1, 1, 16))
    net.same_grid(ir.Reshape, "flat", "mean", (16,))
    net.product(ir.FullyConnected, "logits", "flat", (10,), (16, 10), zero_point=3, scale=0.02)
    net.add(ir.Softmax, "p", "logits", (10,), 1 / 256, -128)
    net.add(ir.Dequantize, "reals", "p", (10,), None, dtype="float32")
    net.add(ir.Logistic, "shares", "logits", (10,), 1 / 256, -128)
    return net.graph("reals", "low", "shares", "product", "larger", "turned")


def uneven_net(seed):
    """uint8 ends, two inputs, unequal strides and dilations, a dense layer on four axes."""
    net = Net(seed, a=((1, 12, 9, 4), "uint8"), b=((1, 12, 9, 4), "int8"))
    for name, zero_point in (("a", 128), ("b", 0)):
        net.tensors[name] = dataclasses.replace(
            net.tensors[name], scale=0.02, zero_point=zero_point
        )
    net.same_grid(ir.Quantize, "a8", "a", (12, 9, 4))
    net.tensors["a8"] = dataclasses.replace(net.tensors["a8"], zero_point=0)
    net.same_grid(ir.Concatenate, "ab", ("a8", "b"), (12, 9, 8), axis=-1)
    conv, depthwise = ir.Conv2D, ir.DepthwiseConv2D
    net.product(conv, "tall", "ab", (6, 9, 6), (5, 2, 8, 6), strides=(2, 1), padding="SAME")
    net.product(depthwise, "wide", "tall", (6, 5, 12), (2, 3, 6, 2), strides=(1, 2), padding="SAME")
    net.product(
        depthwise, "far", "wide", (6, 5, 12), (3, 3, 12, 1), dilation=(2, 2), padding="SAME"
    )
    net.product(depthwise, "step", "far", (2, 2, 12), (3, 2, 12, 1), strides=(2, 2))
    net.product(conv, "reach", "far", (4, 2, 4), (3, 2, 12, 4), dilation=(1, 3))
    net.product(ir.FullyConnected, "point", "reach", (4, 2, 5), (4, 5), 2, activation="relu")
    net.same_grid(
        ir.AveragePool2D, "mean", "point", (2, 1, 5), pool=(3, 2), strides=(2, 2), padding="SAME"
    )
    net.same_grid(ir.Quantize, "out", "mean", (2, 1, 5), dtype="uint8")
    net.tensors["out"] = dataclasses.replace(net.tensors["out"], zero_point=128)
    return net.graph("step", "out")


NETS = {"residual": residual_net, "uneven": uneven_net}


def random_inputs(graph, count, seed=0):
    rng = np.random.default_rng(seed)
    inputs = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        shape = (count, *tensor.shape[1:])
        if tensor.dtype == "float32":
            inputs[name] = rng.normal(0, 1.5, shape).astype(np.float32)
        else:
            bounds = np.iinfo(tensor.dtype)
            inputs[name] = rng.integers(bounds.min, bounds.max + 1, shape).astype(tensor.dtype)
    return inputs


def assert_same_tensors(found, wanted):
    assert list(found) == list(wanted)
    wrong = {name: int((found[name] != wanted[name]).sum()) for name in wanted}
    assert wrong == dict.fromkeys(wanted, 0)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape


def assert_same_graph(found, wanted):
    assert dict(found.tensors) == dict(wanted.tensors)
    assert (found.inputs, found.outputs) == (wanted.inputs, wanted.outputs)
    assert len(found.ops) == len(wanted.ops)
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is type(b)
        assert (a.inputs, a.output, a.source) == (b.inputs, b.output, b.source)
        assert a.attributes == b.attributes
        for name, array in b.constants.items():
            assert a.constants[name].dtype == array.dtype
            np.testing.assert_array_equal(a.constants[name], array)


def to_numpy(outputs):
    return {name: ops.convert_to_numpy(value) for name, value in outputs.items()}


def listed(graph, inputs):
    arrays = [inputs[name] for name in graph.inputs]
    return arrays[0] if len(arrays) == 1 else arrays


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("net", NETS)
def test_every_tensor_equals_the_reference(net, seed):
    graph = NETS[net](seed)
    inputs = random_inputs(graph, 5, seed)
    wanted = reference.run(graph, inputs)
    assert all(np.unique(array).size > 8 for array in wanted.values())
    assert_same_tensors(frozen.tensors_of(frozen.build(graph), inputs, batch_size=2), wanted)


def modes():
    """Ways to run a model on this backend: eager, and `compile` arguments for `predict`."""
    yield "eager", None
    yield "predict", {"jit_compile": keras.backend.backend() == "jax"}
    if keras.backend.backend() == "tensorflow":
        yield "jit", {"jit_compile": True}


@pytest.mark.parametrize(("mode", "arguments"), list(modes()))
@pytest.mark.parametrize("net", NETS)
def test_every_way_to_run_gives_the_same_codes(net, mode, arguments):
    graph = NETS[net](7)
    inputs = random_inputs(graph, 5)
    wanted = reference.run(graph, inputs)
    model = frozen.build(graph)
    x = listed(graph, inputs)
    for ran in (model, frozen.observer(model)):
        if arguments is None:
            found = ran(x)
        else:
            ran.compile(**arguments)
            found = ran.predict(x, verbose=0, batch_size=3)
        # `model` lets the compiler fuse what `observer` makes it write out.
        if ran is model:
            found = dict(zip(graph.outputs, found, strict=True))
        for name, codes in to_numpy(found).items():
            np.testing.assert_array_equal(codes, wanted[name], err_msg=f"{mode} {name}")


@pytest.mark.parametrize("net", NETS)
def test_the_graph_comes_back_from_the_model(net):
    graph = NETS[net](1)
    assert_same_graph(frozen.graph_of(frozen.build(graph)), graph)


@pytest.mark.parametrize("net", NETS)
def test_a_saved_model_loads_in_safe_mode_with_the_same_codes_and_graph(net, tmp_path):
    graph = NETS[net](2)
    path = tmp_path / "frozen.keras"
    frozen.build(graph).save(path)
    loaded = keras.models.load_model(path, safe_mode=True)
    assert_same_graph(frozen.graph_of(loaded), graph)
    inputs = random_inputs(graph, 3)
    assert_same_tensors(frozen.tensors_of(loaded, inputs), reference.run(graph, inputs))


def test_kernels_are_stored_as_int8():
    model = frozen.build(residual_net(0))
    assert {v.dtype for v in model.weights if v.name == "kernel"} == {"int8"}
    assert {v.dtype for v in model.weights if v.name == "bias"} == {"int32"}


def test_nothing_is_trainable_even_when_asked():
    model = frozen.build(residual_net(0))
    model.trainable = True
    assert model.trainable_weights == []


def test_a_global_policy_and_image_format_change_no_code():
    graph = residual_net(3)
    inputs = random_inputs(graph, 2)
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        keras.config.set_image_data_format("channels_first")
        found = frozen.tensors_of(frozen.build(graph), inputs)
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_image_data_format(layout)
    assert_same_tensors(found, reference.run(graph, inputs))


def test_the_batch_of_the_graph_does_not_bind_the_model():
    net = Net(0, x=((1, 6), "int8"))
    net.tensors["x"] = dataclasses.replace(net.tensors["x"], scale=1.0)
    net.same_grid(ir.Reshape, "square", "x", (2, 3))
    net.product(ir.FullyConnected, "y", "square", (2, 4), (3, 4))
    graph = net.graph("y")
    model = frozen.build(graph)
    assert model.input_shape == (None, 6)
    for count in (1, 4):
        inputs = random_inputs(graph, count)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(model(inputs["x"])), reference.run(graph, inputs)["y"]
        )


@pytest.mark.parametrize(
    "structure",
    [{"b": 0, "a": 0}, {"b": [0], "a": {"late": 0}}, [0, 0]],
    ids=["dict", "nested", "list"],
)
def test_outputs_keep_the_structure_that_is_asked_for(structure, tmp_path):
    net = Net(0, x=((1, 5), "int8"))
    net.tensors["x"] = dataclasses.replace(net.tensors["x"], scale=1.0)
    net.product(ir.FullyConnected, "first", "x", (1, 2), (5, 2))
    net.product(ir.FullyConnected, "second", "x", (1, 3), (5, 3))
    graph = net.graph("first", "second")
    inputs = random_inputs(graph, 2)
    wanted = reference.run(graph, inputs)
    frozen.build(graph, outputs=structure).save(tmp_path / "m.keras")
    model = keras.models.load_model(tmp_path / "m.keras")
    assert_same_graph(frozen.graph_of(model), graph)
    assert_same_tensors(frozen.tensors_of(model, inputs), wanted)
    made = model.predict(inputs["x"], verbose=0)
    keras.tree.assert_same_structure(made, structure)
    for name, codes in zip(graph.outputs, keras.tree.flatten(made), strict=True):
        np.testing.assert_array_equal(codes, wanted[name])


def test_a_structure_of_another_number_of_outputs_is_refused():
    graph = residual_net(0)
    with pytest.raises(ValueError, match=r"outputs=.*holds 2 outputs, the graph has 6"):
        frozen.build(graph, outputs={"a": 0, "b": 0})


def test_a_model_cut_short_is_a_frozen_model():
    graph = residual_net(0)
    model = frozen.build(graph)
    cut = keras.Model(model.inputs, [model.get_layer("sum").output])
    assert frozen.graph_of(cut).outputs == ("sum",)
    assert [op.output for op in frozen.graph_of(cut)] == ["q", "stem", "dw", "linear", "sum"]


def test_tensor_names_that_keras_refuses_become_layer_names_and_come_back(tmp_path):
    net = Net(0, **{"in:0": ((1, 5), "int8")})
    net.tensors["in:0"] = dataclasses.replace(net.tensors["in:0"], scale=1.0)
    net.same_grid(ir.Reshape, "block/a.b", "in:0", (5, 1))
    net.same_grid(ir.Reshape, "block_a_b", "block/a.b", (1, 5))
    net.same_grid(ir.Reshape, "1 é", "block_a_b", (5,))
    graph = net.graph("1 é")
    model = frozen.build(graph)
    assert [layer.name for layer in model.layers] == ["in_0", "block_a_b", "block_a_b_2", "t1__"]
    model.save(tmp_path / "m.keras")
    model = keras.models.load_model(tmp_path / "m.keras")
    assert_same_graph(frozen.graph_of(model), graph)
    inputs = random_inputs(graph, 2)
    assert_same_tensors(frozen.tensors_of(model, inputs), reference.run(graph, inputs))


def test_a_tensor_may_be_added_to_itself():
    net = Net(0, x=((1, 5), "int8"))
    net.tensors["x"] = dataclasses.replace(net.tensors["x"], scale=1.0)
    net.add(ir.Add, "y", ("x", "x"), (5,), 2.1)
    graph = net.graph("y")
    inputs = random_inputs(graph, 2)
    model = frozen.build(graph)
    assert_same_graph(frozen.graph_of(model), graph)
    assert_same_tensors(frozen.tensors_of(model, inputs), reference.run(graph, inputs))


def test_an_ordinary_model_is_not_taken_for_a_frozen_one():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="mine")])
    with pytest.raises(ValueError, match="mine"):
        frozen.graph_of(model)


@pytest.mark.parametrize(
    ("cls", "shape", "attributes", "message"),
    [
        (ir.Reshape, None, {}, "reshape y: it moves the batch axis"),
        (ir.Pad, (4, 4, 2), {"paddings": ((1, 0), (0, 0), (0, 0), (0, 0))}, "pad y: it moves"),
        (ir.MaxPool2D, (2, 2, 2), {"padding": "same"}, "padding is 'same'"),
        (ir.Quantize, (4, 4, 2), {}, "quantize y: from codes it only moves"),
    ],
)
def test_what_keras_cannot_compute_is_refused_by_name(cls, shape, attributes, message):
    x = ir.Tensor("x", (1, 4, 4, 2), scale=1.0)
    y = ir.Tensor("y", (2, 16) if shape is None else (1, *shape), scale=1.0)
    graph = ir.Graph({"x": x, "y": y}, (cls(("x",), "y", **attributes),), ("x",), ("y",))
    with pytest.raises(ValueError, match=message):
        frozen.build(graph)


def test_strides_with_dilation_are_refused():
    net = Net(0, x=((1, 9, 9, 2), "int8"))
    net.tensors["x"] = dataclasses.replace(net.tensors["x"], scale=1.0)
    net.product(ir.Conv2D, "y", "x", (3, 3, 2), (3, 3, 2, 2), strides=(2, 2), dilation=(2, 2))
    with pytest.raises(ValueError, match=r"conv_2d y: strides \(2, 2\) with dilation \(2, 2\)"):
        frozen.build(net.graph("y"))


def test_tensors_that_no_output_needs_are_refused():
    graph = residual_net(0)
    graph = dataclasses.replace(graph, outputs=("p",))
    with pytest.raises(ValueError, match="reals"):
        frozen.build(graph)
