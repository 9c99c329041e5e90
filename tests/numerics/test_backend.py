"""The fast forms of a backend: codes and gradients are those of the plain form."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers
from keras_lowbit.numerics import backend, uniform
from keras_lowbit.quantizers import LSQ
from tests import gradients
from tests.gradients import compiled

GRIDS = [(0.0, 15.0), (-7.0, 7.0), (-128.0, 127.0), (0.0, 1.0)]
SCALES = [0.5, 0.1, 0.0123, 3.7]
BACKEND = keras.backend.backend()
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone")
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow alone")


def run(fn, *arrays):
    """`fn` of tensors as NumPy; on TensorFlow in a graph, where its fast forms are."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        fn = tf.function(fn, autograph=False)
    return ops.convert_to_numpy(fn(*(ops.convert_to_tensor(np.float32(a)) for a in arrays)))


def gradient(fn, *arrays):
    """Gradients of the scalar `fn(*tensors)`; on TensorFlow in a graph."""
    if BACKEND != "tensorflow":
        return gradients.gradient(fn, *arrays)
    import tensorflow as tf

    @tf.function(autograph=False)
    def all_of(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = fn(*tensors)
        return tape.gradient(loss, tensors, unconnected_gradients="zero")

    return [g.numpy() for g in all_of(*(tf.constant(np.float32(a)) for a in arrays))]


def hostile(scale, lo, hi, more=0):
    """Ties, both sides of the mask's edges, far outside, and `more` ordinary values."""
    scale = np.float32(scale)
    codes = np.arange(lo - 2, hi + 3, dtype=np.float32)
    edges = (np.float32([lo - 0.5, hi + 0.5]) * scale)[:, None]
    ulps = np.arange(-4, 5) * np.spacing(np.abs(edges))
    ordinary = np.random.default_rng(0).normal(size=more) * scale * hi / 2
    x = [codes * scale, (codes + 0.5) * scale, edges + ulps, [0.0, -0.0, 1e30, -1e30], ordinary]
    return np.concatenate([np.ravel(part) for part in x]).astype(np.float32)


def both_forms(x, scale, lo, hi, gradient_scale=1.0):
    """Codes and gradients `(codes, to x, to scale)` of the form in use and of the plain one."""
    g = np.random.default_rng(1).normal(size=np.shape(x)).astype(np.float32)
    found = []
    for quantize in (uniform.quantize, uniform.plain_quantize):

        def loss(x, scale, quantize=quantize):
            return ops.sum(quantize(x, scale, lo, hi, gradient_scale) * ops.convert_to_tensor(g))

        codes = run(lambda x, s, q=quantize: q(x, s, lo, hi, gradient_scale), x, scale)
        found.append([codes, *gradient(loss, x, scale)])
    return found


class TestCodes:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("scale", SCALES)
    def test_equal_those_of_the_plain_form_and_so_do_gradients(self, scale, grid):
        fast, plain = both_forms(hostile(scale, *grid), scale, *grid)
        np.testing.assert_array_equal(fast[0], plain[0])
        np.testing.assert_array_equal(fast[1], plain[1])
        # Sums of up to 520 terms in another order.
        np.testing.assert_allclose(fast[2], plain[2], rtol=1e-4)

    def test_of_more_values_than_one_round_takes(self):
        x = hostile(0.1, -7.0, 7.0, more=300_000)
        fast, plain = both_forms(x, 0.1, -7.0, 7.0, 0.125)
        np.testing.assert_array_equal(fast[0], plain[0])
        np.testing.assert_array_equal(fast[1], plain[1])
        # Sums of 300,000 terms in another order.
        np.testing.assert_allclose(fast[2], plain[2], rtol=1e-3)

    @pytest.mark.parametrize("value", [1e30, -1e30, np.nan])
    def test_of_values_past_all_grids_are_the_ends_and_nan_stays(self, value):
        codes = run(lambda x, scale: uniform.quantize(x, scale, -8.0, 7.0), [value, 1.0], 0.5)
        expected = value if np.isnan(value) else 7 if value > 0 else -8
        np.testing.assert_array_equal(codes, [expected, 2])

    def test_of_channels_and_their_gradients_are_those_of_the_plain_form(self):
        scale = np.float32([0.5, 0.1, 0.0123])
        x = np.stack([hostile(s, -7.0, 7.0) for s in scale], axis=-1).reshape(3, -1, 3)
        fast, plain = both_forms(x, scale, -7.0, 7.0, 0.5)
        np.testing.assert_array_equal(fast[0], plain[0])
        np.testing.assert_array_equal(fast[1], plain[1])
        np.testing.assert_allclose(fast[2], plain[2], rtol=1e-5)  # 60 terms in another order

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_keep_the_dtype(self, dtype):
        if BACKEND == "jax" and dtype == "float64":
            pytest.skip("JAX has no float64 unless it is asked for")
        x = ops.convert_to_tensor(np.array([0.6, -9.0]), dtype=dtype)
        codes = uniform.quantize(x, ops.convert_to_tensor(0.5, dtype=dtype), -8.0, 7.0)
        assert codes.dtype == x.dtype
        np.testing.assert_array_equal(ops.convert_to_numpy(codes), [1, -8])

    def test_of_a_turned_tensor_stay_in_their_places(self):
        x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)

        def turned(quantize):
            return lambda t: ops.sum(
                quantize(ops.transpose(t, (2, 0, 1)), np.float32(0.3), -2.0, 1.0)
                * ops.convert_to_tensor(np.arange(60, dtype=np.float32).reshape(5, 3, 4))
            )

        np.testing.assert_array_equal(
            gradient(turned(uniform.quantize), x)[0], gradient(turned(uniform.plain_quantize), x)[0]
        )


# codes' shape, kernel's shape, options
CONVOLUTIONS = {
    "valid": ((2, 7, 5, 3), (3, 3, 3, 4), {}),
    "same": ((2, 7, 5, 3), (3, 3, 3, 4), {"padding": "same"}),
    "one pad more after": ((2, 8, 6, 3), (3, 3, 3, 4), {"padding": "same", "strides": (2, 2)}),
    "pads of odd sizes": ((2, 7, 5, 3), (3, 3, 3, 4), {"padding": "same", "strides": (2, 2)}),
    "a pad in one axis": ((1, 8, 7, 2), (2, 3, 2, 3), {"padding": "same"}),
    "pointwise": ((2, 4, 3, 5), (1, 1, 5, 6), {}),
    "pointwise, stride": ((2, 5, 4, 3), (1, 1, 3, 2), {"padding": "same", "strides": (2, 2)}),
    "dilation": ((1, 9, 8, 2), (3, 3, 2, 3), {"dilation_rate": (2, 2), "padding": "same"}),
    "groups": ((2, 6, 5, 4), (3, 3, 2, 6), {"padding": "same"}),
    "one channel": ((2, 6, 5, 1), (3, 3, 1, 3), {"padding": "same"}),
    "one pixel": ((2, 1, 1, 3), (3, 3, 3, 2), {"padding": "same"}),
}
DEPTHWISE = {
    "valid": ((2, 7, 5, 3), (3, 3, 3, 1), {}),
    "same": ((2, 7, 5, 3), (3, 3, 3, 1), {"padding": "same"}),
    "stride": ((2, 8, 6, 3), (3, 3, 3, 1), {"padding": "same", "strides": (2, 2)}),
    "stride, odd": ((2, 7, 9, 3), (5, 5, 3, 1), {"padding": "same", "strides": (2, 2)}),
    "stride, valid": ((2, 9, 8, 3), (3, 3, 3, 1), {"strides": (2, 2)}),
    "stride beyond the kernel": ((2, 9, 8, 3), (2, 2, 3, 1), {"strides": (3, 3)}),
    "beyond the image": ((2, 3, 2, 3), (5, 5, 3, 1), {"padding": "same"}),
    "large": ((2, 8, 9, 3), (7, 7, 3, 1), {"padding": "same"}),
    "one pixel": ((2, 1, 1, 3), (3, 3, 3, 1), {"padding": "same"}),
    "multiplier": ((2, 6, 5, 2), (3, 3, 2, 3), {"padding": "same"}),
    "dilation": ((1, 9, 8, 2), (3, 3, 2, 2), {"dilation_rate": (2, 2)}),
    "one channel": ((2, 6, 5, 1), (3, 3, 1, 2), {"padding": "same"}),
}
DENSE = {"rows": ((3, 5), (5, 4), {}), "more axes": ((2, 3, 5), (5, 4), {})}
PRODUCTS = [
    *(("conv", *case) for case in CONVOLUTIONS.items()),
    *(("depthwise_conv", *case) for case in DEPTHWISE.items()),
    *(("matmul", *case) for case in DENSE.items()),
]
every_product = pytest.mark.parametrize(
    ("operation", "case"),
    [(p[0], p[2]) for p in PRODUCTS],
    ids=[f"{p[0]}: {p[1]}" for p in PRODUCTS],
)


def operands(case, per_filter):
    """Codes, kernel and scale of a case, and the form in `keras.ops` of the product."""
    shape, kernel_shape, _ = case
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, shape).astype(np.float32)
    kernel = rng.integers(-7, 8, kernel_shape).astype(np.float32)
    filters = kernel_shape[-1] * (kernel_shape[-2] if per_filter == "depthwise_conv" else 1)
    scale = rng.uniform(0.01, 0.1, filters if per_filter else ()).astype(np.float32)
    return codes, kernel, scale


def plain_product(operation, codes, kernel, scale, options):
    product = getattr(ops, operation)
    return product(codes, kernel, **options) * ops.stop_gradient(scale)


@every_product
@pytest.mark.parametrize("per_filter", [False, True])
class TestProducts:
    def test_are_those_of_the_plain_form_bit_for_bit(self, operation, case, per_filter):
        codes, kernel, scale = operands(case, per_filter and operation)
        got = run(lambda *t: getattr(backend, operation)(*t, **case[2]), codes, kernel, scale)
        want = run(lambda *t: plain_product(operation, *t, case[2]), codes, kernel, scale)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)

    def test_have_the_gradients_of_the_plain_form(self, operation, case, per_filter):
        codes, kernel, scale = operands(case, per_filter and operation)
        shape = run(lambda *t: plain_product(operation, *t, case[2]), codes, kernel, scale).shape
        g = np.random.default_rng(1).normal(size=shape).astype(np.float32)

        def loss(product):
            return lambda x, k, s: ops.sum(product(x, k, s) * ops.convert_to_tensor(g))

        got = gradient(
            loss(lambda *t: getattr(backend, operation)(*t, **case[2])), codes, kernel, scale
        )
        want = gradient(
            loss(lambda *t: plain_product(operation, *t, case[2])), codes, kernel, scale
        )
        for one, other in zip(got, want, strict=True):
            # The scale is multiplied before the sum instead of after: other last bits.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
        np.testing.assert_array_equal(got[2], 0)


def test_a_product_worked_by_hand():
    """x = (3, -1), kernel (2, 5), scale 0.25: y = (6 - 5) / 4; y^2 to x: y kernel / 2."""
    x, kernel = np.float32([[3.0, -1.0]]), np.float32([[2.0], [5.0]])

    def loss(x, kernel):
        y = backend.matmul(x, kernel, ops.convert_to_tensor(np.float32(0.25)))
        return ops.sum(y * y)  # 2 y = 0.5 comes back

    np.testing.assert_array_equal(run(backend.matmul, x, kernel, 0.25), [[0.25]])
    to_x, to_kernel = gradient(loss, x, kernel)
    np.testing.assert_array_equal(to_x, [[0.25, 0.625]])
    np.testing.assert_array_equal(to_kernel, [[0.375], [-0.125]])


def small_model(bits=8):
    """A convolution, a depthwise one and a dense layer on codes."""
    inputs = keras.Input((6, 5, 2))
    pair = layers.Quantize(LSQ(bits, role="activation"))(inputs)
    x = layers.QuantizedConv2D(4, 3, strides=2, padding="same", kernel_quantizer="lsq")(pair)
    pair = layers.Quantize(LSQ(bits, role="activation"))(x)
    x = layers.QuantizedDepthwiseConv2D(3, padding="same", kernel_quantizer="lsq")(pair)
    x = keras.layers.Flatten()(x)
    pair = layers.Quantize(LSQ(bits, role="activation"))(x)
    model = keras.Model(inputs, layers.QuantizedDense(3, kernel_quantizer="lsq")(pair))
    for quantizer in quantizers_of(model):
        quantizer.scale.assign(np.full(quantizer.scale.shape, 0.05, np.float32))
    # The form inside the step, not a step that XLA compiles whole.
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    return model


def quantizers_of(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, LSQ)]


def trained(model, x, y):
    for bits in (8, 2, 1):
        for quantizer in quantizers_of(model):
            quantizer.set_bits(bits)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 6, 5, 2)).astype("float32"), rng.normal(size=(8, 3)).astype(
        "float32"
    )


def test_training_is_that_of_the_plain_form_and_sees_a_change_of_bits(monkeypatch):
    x, y = data()
    keras.utils.set_random_seed(1)
    fast = trained(small_model(), x, y)
    monkeypatch.setattr(backend, "_fast", lambda *_: None)
    keras.utils.set_random_seed(1)
    plain = trained(small_model(), x, y)
    for one, other in zip(fast.weights, plain.weights, strict=True):
        # Twelve steps of gradients that differ in last bits.
        np.testing.assert_allclose(
            ops.convert_to_numpy(one), ops.convert_to_numpy(other), rtol=1e-3, atol=1e-5
        )
    untouched = small_model().get_weights()
    assert any((a != b).any() for a, b in zip(fast.get_weights(), untouched, strict=True))


def test_new_bits_change_what_a_compiled_model_predicts():
    x, _ = data()
    model = small_model()
    before = model.predict(x, verbose=0)
    for quantizer in quantizers_of(model):
        quantizer.set_bits(2)
    assert (model.predict(x, verbose=0) != before).any()


def test_a_loaded_model_predicts_the_same_bits(tmp_path):
    x, y = data()
    model = trained(small_model(), x, y)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_compiled_whole_the_codes_are_the_same():
    x = hostile(0.1, -7.0, 7.0)

    def codes(x):
        return uniform.quantize(x, np.float32(0.1), -7.0, 7.0, None)

    np.testing.assert_array_equal(
        compiled(codes)(x), ops.convert_to_numpy(codes(ops.convert_to_tensor(x)))
    )


@only_tensorflow
class TestTensorFlow:
    def answers(self, *, jit_compile=False, dtype="float32"):
        """Whether there is a fast form of a quantizer and of the products, in a graph."""
        import tensorflow as tf

        found = []

        @tf.function(jit_compile=jit_compile, autograph=False)
        def graph(x, kernel):
            scale = tf.constant(0.5)
            found.append(backend.quantize(x, scale, -8.0, 7.0, 1.0) is not None)
            two = tf.constant([0.5, 0.25])
            found.append(backend.quantize(x, two, -8.0, 7.0, 1.0) is not None)
            for operation in ("conv", "depthwise_conv"):
                how = ((1, 1), "same", (1, 1))
                found.append(backend._fast(operation, x, kernel, scale, *how) is not None)
            return x

        graph(tf.ones((1, 5, 4, 2), dtype), tf.ones((3, 3, 2, 2), dtype))
        return found

    def test_takes_the_fast_forms_in_a_graph(self):
        assert self.answers() == [True] * 4

    def test_leaves_a_graph_that_xla_compiles_whole_and_other_dtypes_alone(self):
        assert self.answers(jit_compile=True) == [False] * 4
        assert self.answers(dtype="float64") == [False] * 4

    def test_the_batch_may_be_unknown(self):
        import tensorflow as tf

        spec = tf.TensorSpec((None, 5, 4, 2), tf.float32)

        @tf.function(input_signature=[spec], autograph=False)
        def to_x(x):
            kernel = tf.ones((3, 3, 2, 4))
            with tf.GradientTape() as tape:
                tape.watch(x)
                codes = uniform.quantize(x, tf.constant(0.5), -8.0, 7.0)
                assert codes.shape.as_list() == [None, 5, 4, 2]
                y = tf.reduce_sum(backend.conv(codes, kernel, tf.constant(2.0)))
            return tape.gradient(y, x)

        # A corner pixel lies in one window: 4 filters, times 2, over the scale 0.5.
        assert to_x(tf.ones((3, 5, 4, 2))).numpy()[:, 0, 0].tolist() == [[16.0, 16.0]] * 3


@only_torch
class TestPyTorch:
    def tensors(self, **options):
        import torch

        return torch.ones((2, 3), **options), torch.tensor(0.5)

    def test_takes_the_fast_form_for_what_it_covers(self):
        x, scale = self.tensors()
        assert backend.quantize(x, scale, -8.0, 7.0, 1.0) is not None
        assert backend.quantize(x, scale.expand(3), -8.0, 7.0, 1.0) is not None
        assert backend.known(scale) == 0.5
        assert backend._fast("matmul", x, x.mT, scale) is not None

    def test_declines_what_it_does_not(self):
        import torch

        x, scale = self.tensors()
        for other in (x.double(), x.to("meta"), x[:0], np.ones((2, 3), np.float32)):
            assert backend.quantize(other, scale, -8.0, 7.0, 1.0) is None
        for bad in (0.0, np.inf, -1.0, np.nan):
            assert backend.quantize(x, torch.tensor(bad), -8.0, 7.0, 1.0) is None
        assert backend.known(scale.double()) is None

    def test_transforms_of_functions_see_the_plain_form(self):
        import torch

        x = torch.tensor([0.6, 10.0, -0.3])
        scale = torch.tensor(0.5)

        def loss(x):
            return (uniform.quantize(x, scale, -8.0, 7.0) * x.detach()).sum()

        np.testing.assert_allclose(torch.func.grad(loss)(x), [1.2, 0.0, -0.6], rtol=1e-6)  # float32
        each = torch.func.vmap(lambda v: uniform.quantize(v, scale, -8.0, 7.0))(x)
        np.testing.assert_array_equal(each, [1, 7, -1])

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_gradients_of_gradients_are_those_of_the_plain_form(self, per_channel):
        import torch

        rng = np.random.default_rng(0)
        start = [rng.normal(size=s).astype(np.float32) for s in ((2, 6, 5, 2), (3, 3, 2, 4))]
        size = np.float32([0.1, 0.2, 0.3, 0.4]) if per_channel else np.float32(0.2)

        def twice(quantize, conv):
            x, kernel = (torch.tensor(a, requires_grad=True) for a in start)
            scale = torch.tensor(size, requires_grad=True)
            codes = quantize(x, torch.tensor(0.3), -7.0, 7.0)
            outputs = conv(codes, quantize(kernel, scale, -7.0, 7.0), scale.detach())
            first = torch.autograd.grad((outputs**2).sum(), [x, kernel, scale], create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in first), [x, kernel, scale])

        fast = twice(uniform.quantize, backend.conv)
        plain = twice(uniform.plain_quantize, lambda x, k, s: plain_product("conv", x, k, s, {}))
        for one, other in zip(fast, plain, strict=True):
            assert torch.isfinite(other).all()
            assert other.abs().max() > 0
            # Sums in another order.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max())

    def test_the_first_real_outside_the_mask_is_found_at_every_scale(self):
        from keras_lowbit.numerics.backend_torch import _first_above

        rng = np.random.default_rng(0)
        for inverse in np.float32(np.exp(rng.uniform(-80, 80, 2000))):
            for ratio in np.float32([0.5, 7.5, 255.5, -0.5]):
                with np.errstate(over="ignore", under="ignore"):
                    first = np.float32(_first_above(ratio, inverse))
                    assert first * inverse > ratio
                    assert np.nextafter(first, np.float32(-np.inf)) * inverse <= ratio
