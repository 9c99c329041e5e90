"""Joint distillation: Zhuang et al., arXiv:1908.04680, the losses of methods 2.7."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import quantizers
from keras_lowbit.callbacks import BitDescent, CyclicPrecision, TwoStage
from keras_lowbit.distillation import Distiller, MutualDistiller
from keras_lowbit.distillation.divergence import divergence, on_grid_of
from keras_lowbit.quantizers.sites import sites_of
from keras_lowbit.transform.calibrate import calibrate
from keras_lowbit.transform.quantize_model import quantize_model
from tests.callbacks import tiny
from tests.gradients import gradient

HINT = ("relu2", "relu2_quantize")


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, optimizer=None, **options):
    jit = keras.backend.backend() == "jax"
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss(), jit_compile=jit, **options)
    return model


def quantized(scheme, seed=1):
    keras.utils.set_random_seed(seed)
    return calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])


def float_model(seed=2):
    keras.utils.set_random_seed(seed)
    return tiny.float_model()


def arrays(model):
    return [np.array(ops.convert_to_numpy(w)) for w in model.weights]


class TestDivergence:
    def test_by_hand(self):
        """Logits [ln 3, 0] and [0, 0]: p = (3/4, 1/4), q = (1/2, 1/2).

        KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; gradient to the logits q - p = (-1/4, 1/4).
        """
        target, logits = [[np.log(3.0), 0.0]], [[0.0, 0.0]]
        value = float(divergence(ops.cast(target, "float32"), ops.cast(logits, "float32"), 1.0))
        assert value == pytest.approx(0.130812, rel=1e-5)  # six digits by hand
        to_target, to_logits = gradient(lambda t, z: divergence(t, z, 1.0), target, logits)
        np.testing.assert_array_equal(to_target, [[0, 0]])
        np.testing.assert_allclose(to_logits, [[-0.25, 0.25]], rtol=1e-6)  # float32

    def test_the_square_of_the_temperature_keeps_the_size_of_gradients(self):
        """T = 2, logits twice as far: the same p and q; T^2 KL, and T (q - p) for gradients."""
        target, logits = [[2 * np.log(3.0), 0.0]], [[0.0, 0.0]]
        value = float(divergence(ops.cast(target, "float32"), ops.cast(logits, "float32"), 2.0))
        assert value == pytest.approx(4 * 0.130812, rel=1e-5)  # as above
        _, to_logits = gradient(lambda t, z: divergence(t, z, 2.0), target, logits)
        np.testing.assert_allclose(to_logits, [[-0.5, 0.5]], rtol=1e-6)  # float32

    def test_nets_that_agree_are_0_apart_with_no_gradient(self):
        logits = np.random.default_rng(0).normal(size=(5, 7)).astype("float32") * 9
        tensor = ops.convert_to_tensor(logits)
        assert float(divergence(tensor, tensor, 3.0)) == 0.0
        (to_logits,) = gradient(lambda z: divergence(tensor, z, 3.0), logits)
        # q sum(p) - p, where float32's sum of p is 1 to a rounding.
        np.testing.assert_allclose(to_logits, np.zeros((5, 7)), atol=3e-7)

    def test_classes_of_tiny_probability_keep_their_gradient(self):
        """Logits 0 and -30, target even: q - p = 1/2 and -1/2, though q = 1e-13."""
        (to_logits,) = gradient(lambda z: divergence(ops.zeros((1, 2)), z, 1.0), [[0.0, -30.0]])
        np.testing.assert_allclose(to_logits, [[0.5, -0.5]], rtol=1e-6)  # float32


def test_hints_put_the_float_map_on_the_grid_and_train_only_it():
    """2 bits unsigned, scale 0.5, codes 0..3: 1.74 is the last inside."""
    quantizer = quantizers.LSQ(2, signed=False, role="activation")
    quantizer.build((None, 5))
    quantizer.scale.assign(0.5)
    x = np.float32([[-0.3, 0.2, 0.8, 1.74, 1.8]])
    got = ops.convert_to_numpy(on_grid_of(quantizer, ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(got, [[0, 0, 1, 1.5, 1.5]])
    to_x, to_scale = gradient(
        lambda t: ops.sum(on_grid_of(quantizer, t)), x, variables=[quantizer.scale]
    )
    np.testing.assert_array_equal(to_x, [[0, 1, 1, 1, 0]])
    assert to_scale == 0


def test_hints_behind_a_switched_off_quantizer_let_everything_pass():
    """Codes 0..3 of scale 1, the scale of reals, would cut the gradient of -2 and 9."""
    quantizer = quantizers.LSQ(2, signed=False, role="activation")
    quantizer.build((None, 3))
    quantizer.add_switch()
    x = np.float32([[-2.0, 0.2, 9.0]])
    for enabled, wanted in ((True, [[0, 1, 0]]), (False, [[1, 1, 1]])):
        quantizer.set_enabled(enabled)
        (to_x,) = gradient(lambda t: ops.sum(on_grid_of(quantizer, t)), x)
        np.testing.assert_array_equal(to_x, wanted)
    got = ops.convert_to_numpy(on_grid_of(quantizer, ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(got, x)


def test_a_quantizer_learns_nothing_of_the_float_nets_map():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    balanced = quantizers.ChannelBalanced(4)
    running = quantizers.MinMax(4, role="activation")
    for quantizer in (balanced, running):
        quantizer.build(x.shape)
        quantizer.fit_scale(x)
    running.update_ranges.assign(1.0)
    on_grid_of(balanced, ops.convert_to_tensor(5.0 * x))
    assert balanced.losses == []
    ends = [float(ops.convert_to_numpy(v)) for v in (running.low, running.high)]
    on_grid_of(running, ops.convert_to_tensor(5.0 * x))
    assert [float(ops.convert_to_numpy(v)) for v in (running.low, running.high)] == ends
    # Of its own tensor it does.
    balanced(ops.convert_to_tensor(x))
    running(ops.convert_to_tensor(5.0 * x))
    assert len(balanced.losses) == 1
    assert float(ops.convert_to_numpy(running.high)) > ends[1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", ["mutual", "hints", "frozen"])
def test_float_nets_of_halves_teach(policy, kind, monkeypatch):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        teacher, student = float_model(), quantized("w4a4")
    finally:
        keras.config.set_dtype_policy(before)
    if kind == "frozen":
        wanted = keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence())
        model = Distiller(teacher=teacher, student=student, distillation_losses=wanted)
    else:
        model = MutualDistiller(teacher, [student], hints=(HINT,) if kind == "hints" else ())
    x, y = tiny.images(8)
    history = compiled(model).fit(x, y, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))


@pytest.mark.parametrize("hints", [(), (HINT,)])
def test_each_loss_moves_its_own_net_alone(hints):
    """methods 2.10: gradients of L_j to float weights are exactly zero, and vice versa."""
    teacher, students = float_model(), [quantized("w2a2"), quantized("w4a4", seed=3)]
    model = compiled(MutualDistiller(teacher, students, hints=hints))
    x, y = tiny.images(8)
    nets = [teacher, *students]
    for i in range(3):
        variables = [v for net in nets for v in net.trainable_variables]
        grads = gradient(
            lambda t, i=i: model.losses_of(y, model(t, training=False))[i], x, variables=variables
        )[1:]
        moved = []
        for net in nets:
            own, grads = np.split(np.array(grads, object), [len(net.trainable_variables)])
            moved.append(any(np.any(g != 0) for g in own))
        assert moved == [net is nets[i] for net in nets]


def test_the_loss_is_the_sum_by_hand():
    teacher, students = float_model(), [quantized("w2a2"), quantized("w4a4", seed=3)]
    weights = {"a_s": 0.7, "b_s": 0.3, "a_t": 0.9, "b_t": 0.5, "temperature": [1.0, 2.0]}
    model = compiled(MutualDistiller(teacher, students, **weights))
    x, y = tiny.images(8)
    z_f, *z = (np.float64(ops.convert_to_numpy(net(x))) for net in (teacher, *students))

    def softmax(v):
        e = np.exp(v - v.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def ce(v):
        return -np.log(softmax(v)[np.arange(8), y]).mean()

    def kl(a, b, t):
        p, q = softmax(a / t), softmax(b / t)
        return t * t * (p * np.log(p / q)).sum(-1).mean()

    want = [
        0.9 * ce(z_f) + 0.5 * (kl(z[0], z_f, 1.0) + kl(z[1], z_f, 2.0)) / 2,
        0.7 * ce(z[0]) + 0.3 * kl(z_f, z[0], 1.0),
        0.7 * ce(z[1]) + 0.3 * kl(z_f, z[1], 2.0),
    ]
    logs = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    got = [logs["loss_float"], logs["loss_0"], logs["loss_1"]]
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32
    assert logs["loss"] == pytest.approx(sum(want), rel=1e-5)  # as above


def test_without_divergence_training_is_independent():
    """b = 0, a = 1: every net ends where it ends alone, batch norms included."""
    alone = []
    for net in (float_model(), quantized("w2a2")):
        tiny.train(compiled(net), [], epochs=1)
        alone.append(arrays(net))
    teacher, student = float_model(), quantized("w2a2")
    together = MutualDistiller(teacher, [student], a_s=1.0, b_s=0.0, a_t=1.0, b_t=0.0)
    tiny.train(compiled(together), [], epochs=1)
    for net, want in zip((teacher, student), alone, strict=True):
        for got, array in zip(arrays(net), want, strict=True):
            # Compiled as another graph: sums in another order.
            np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-6)


def test_a_frozen_teacher_stays_as_it_is():
    teacher, student = float_model(), quantized("w2a2")
    before, start = arrays(teacher), arrays(student)
    model = MutualDistiller(teacher, [student], frozen_teacher=True, hints=[HINT])
    history = tiny.train(compiled(model, metrics=["accuracy"]), [], epochs=1)
    for a, b in zip(before, arrays(teacher), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(start, arrays(student), strict=True))
    assert set(history.history) == {"loss", "loss_0", "accuracy"}


def test_metrics_are_those_of_the_first_quantized_model():
    student = quantized("w2a2")
    model = compiled(MutualDistiller(float_model(), [student]), metrics=["accuracy"])
    x, y = tiny.images()
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    right = ops.convert_to_numpy(student(x)).argmax(-1) == y
    assert logs["accuracy"] == pytest.approx(right.mean())


def test_penalties_of_layers_count_once():
    """An L2 of 0.5 on the float model's last bias of (1, 2, 2): 0.5 * 9."""
    teacher = float_model()
    last = teacher.get_layer("last")
    last.bias_regularizer = keras.regularizers.L2(0.5)
    last.bias.regularizer = last.bias_regularizer
    last.bias.assign([1.0, 2.0, 2.0])
    model = compiled(MutualDistiller(teacher, [quantized("w2a2"), quantized("w4a4", 3)]))
    x, y = tiny.images(8)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    parts = logs["loss_float"] + logs["loss_0"] + logs["loss_1"]
    assert logs["loss"] - parts == pytest.approx(4.5, rel=1e-5)  # a difference of float32 losses


def test_cycling_descent_and_two_stages_compose_with_distillation_in_one_fit():
    teacher, student = float_model(), quantized("w2a2")
    model = compiled(MutualDistiller(teacher, [student], hints=[HINT]), keras.optimizers.Adam(1e-4))
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                q = [student.get_layer("middle").kernel_quantizer]
                q.append(student.get_layer("relu1_quantize").quantizer)
                seen.append([(one.bits, one.enabled) for one in q])

    plan = [
        TwoStage(1),
        CyclicPrecision(2, 4, cycles=2, epochs=4, targets="weights"),
        BitDescent({1: 3, 3: 2}, targets="activations"),
        Watch(),
    ]
    history = tiny.train(model, plan, epochs=4)
    kernels = [(4, True), (2, True), (4, True), (2, True)]
    activations = [(2, False), (3, True), (3, True), (2, True)]
    assert seen == [list(pair) for pair in zip(kernels, activations, strict=True)]
    assert np.isfinite(history.history["loss"]).all()
    assert {s.quantizer.enabled for s in sites_of(student)} == {True}


def ending(how, name, seed):
    """A model of three classes that ends in a softmax or sigmoid, however it is written."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(tiny.SHAPE)
    x = keras.layers.Flatten()(inputs)
    x = keras.layers.Dense(3, activation="softmax" if how == "activation" else None)(x)
    if how == "nested":
        image = keras.Input((3,))
        x = keras.Model(image, keras.layers.Softmax()(image))(x)
    elif how == "reshaped":
        x = keras.layers.Reshape((3,))(keras.ops.sigmoid(x))
    return keras.Model(inputs, x, name=name)


@pytest.mark.parametrize("how", ["activation", "nested", "reshaped"])
@pytest.mark.parametrize("low_bit", [False, True], ids=["float", "low-bit"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_model_must_end_in_logits(how, low_bit, place):
    nets = [ending("logits", f"net{i}", i) for i in range(3)]
    nets[place] = ending(how, "answers", 9)
    if low_bit:
        nets[place] = quantize_model(nets[place])
    with pytest.raises(ValueError, match=f"{nets[place].name} ends in probabilities.*without the"):
        MutualDistiller(nets[0], nets[1:])


class TestBadInput:
    def test_a_teacher_with_other_outputs_is_refused(self):
        inputs = keras.Input(tiny.SHAPE)
        x = keras.layers.Flatten()(inputs)
        other = keras.Model(inputs, keras.layers.Dense(4)(x), name="four")
        with pytest.raises(ValueError, match=r"output_shape \(None, 3\), but four has \(None, 4\)"):
            MutualDistiller(other, [quantized("w2a2")])

    def test_models_that_share_weights_are_refused(self):
        teacher = float_model()
        with pytest.raises(ValueError, match="tiny and tiny share the variable"):
            MutualDistiller(teacher, [teacher])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"b_s": -1}, "b_s must be a finite number, at least 0. Got -1"),
            ({"temperature": 0}, "temperature is one positive number"),
            ({"temperature": [1, 2]}, "or 1 of them"),
            ({"hints": [("relu3", "relu2_quantize")]}, r"no layer 'relu3'\. Did you mean 'relu"),
            ({"hints": [("relu2", "relu2")]}, "A hint needs a Quantize layer"),
            ({"hints": [("relu1", "relu2_quantize")]}, "maps of equal shape"),
            ({"hints": ["relu2"]}, "a hint is a pair of names"),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MutualDistiller(float_model(), [quantized("w2a2")], **arguments)

    def test_one_model_instead_of_a_list_is_refused(self):
        with pytest.raises(ValueError, match="quantized_models is a list"):
            MutualDistiller(float_model(), quantized("w2a2"))

    @pytest.mark.parametrize(
        "wrong",
        [None, "mse", keras.losses.SparseCategoricalCrossentropy()],
        ids=("none", "mse", "of_probabilities"),
    )
    def test_a_loss_on_probabilities_is_refused(self, wrong):
        model = MutualDistiller(float_model(), [quantized("w2a2")])
        with pytest.raises(ValueError, match="must be an object that takes logits"):
            model.compile("sgd", wrong)
