"""What it means to be a quantizer: laws that every registered one keeps."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit import layers, quantizers
from tests.gradients import compiled, gradient

NAMES = quantizers.names()
CASES = [(name, role) for name in NAMES for role in type(quantizers.get(name)).roles]
every_case = pytest.mark.parametrize(("name", "role"), CASES)
# The scale of these kernels is computed from the kernel and is no state.
WITHOUT_A_GRID = [(name, "kernel") for name in ("minmax", "ternary", "levels")]


def width(name, wanted):
    """`wanted`, or the one width that the quantizer has."""
    return {"ternary": 2, "sign": 1}.get(name, wanted)


@pytest.fixture
def x():
    """Reals that bfloat16 holds exactly, an odd number of them."""
    x = np.random.default_rng(0).normal(size=(31, 3)).astype(np.float32)
    return ops.convert_to_numpy(ops.cast(ops.cast(x, "bfloat16"), "float32"))


def calibrated(name, role, x, bits=4, shrink=0.3):
    """A quantizer fitted to `shrink * x`, so that many values of `x` saturate."""
    quantizer = quantizers.get(name, bits=width(name, bits), role=role)
    quantizer.build(x.shape)
    quantizer.fit_scale(x * np.float32(shrink))
    if name == "levels":
        quantizer.snap()  # reals until then
    return quantizer


def encode(quantizer, x):
    return [ops.convert_to_numpy(v) for v in quantizer.encode(ops.convert_to_tensor(x))]


@every_case
class TestEveryQuantizer:
    def test_a_config_round_trip_keeps_every_argument(self, name, role):
        first = quantizers.get(name, bits=width(name, 5), role=role, signed=True)
        again = type(first).from_config(first.get_config())
        assert again.get_config() == first.get_config()
        assert again.bits == width(name, 5)
        assert again.role == role

    def test_a_saved_model_loads_with_equal_codes(self, name, role, x, tmp_path):
        inputs = keras.Input((3,))
        if role == "kernel":
            made = layers.QuantizedDense(
                2, kernel_quantizer=quantizers.get(name, bits=width(name, 4))
            )
            outputs, quantizer = made(inputs), made.kernel_quantizer
        else:
            made = layers.Quantize(name, bits=width(name, 4))
            outputs, quantizer = layers.Dequantize()(made(inputs)), made.quantizer
        model = keras.Model(inputs, outputs)
        quantizer.fit_scale(ops.convert_to_numpy(made.kernel) if role == "kernel" else x)
        later = 4 if name == "levels" else width(name, 3)
        quantizer.set_bits(later)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        copy = again.layers[1].kernel_quantizer if role == "kernel" else again.layers[1].quantizer
        assert copy.bits == later
        assert float(ops.convert_to_numpy(copy.calibrated)) == 1
        assert copy.static_bounds() == quantizer.static_bounds()
        np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, again)))

    @pytest.mark.parametrize("bits", [1, 2, 4, 7])
    def test_codes_are_whole_numbers_of_the_grid(self, name, role, bits, x):
        quantizer = calibrated(name, role, x, bits)
        codes, scale = encode(quantizer, x)
        lo, hi = quantizer.static_bounds()
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert lo <= codes.min() < codes.max() <= hi
        assert np.all(scale > 0)
        assert codes.shape == x.shape

    def test_the_scale_broadcasts_over_the_last_axes(self, name, role, x):
        codes, scale = encode(calibrated(name, role, x), x)
        assert scale.shape == ()
        values = ops.convert_to_numpy(calibrated(name, role, x)(x))
        np.testing.assert_array_equal(values, codes * scale)

    def test_codes_of_its_own_output_are_the_same_codes(self, name, role, x):
        quantizer = calibrated(name, role, x)
        codes, scale = encode(quantizer, x)
        again, _ = encode(quantizer, codes * scale)
        broken = "idempotent" in quantizer.breaks and role == "kernel"
        assert (again == codes).all() != broken

    def test_codes_never_decrease(self, name, role, x):
        codes, _ = encode(calibrated(name, role, x), np.sort(x, axis=None).reshape(x.shape))
        assert (np.diff(codes.reshape(-1)) >= 0).all()

    @pytest.mark.parametrize("bits", [1, 4])
    def test_gradients_are_finite_and_reach_the_input(self, name, role, bits, x):
        quantizer = calibrated(name, role, x, bits)
        trained = quantizer.trainable_variables
        to_x, *others = gradient(lambda t: ops.sum(quantizer(t) * t), x, variables=trained)
        assert to_x.shape == x.shape
        assert np.any(to_x != 0)
        assert [g.shape for g in others] == [tuple(v.shape) for v in trained]

    def test_compiled_codes_are_the_eager_ones(self, name, role, x):
        quantizer = calibrated(name, role, x)
        for got, want in zip(compiled(quantizer.encode)(x), encode(quantizer, x), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_mixed_precision_changes_no_code(self, name, role, x):
        want = encode(calibrated(name, role, x, bits=7), x)
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            quantizer = calibrated(name, role, x, bits=7)

            class Holder(keras.layers.Layer):
                """Computes in bfloat16, where Keras casts the variables that are read."""

                def call(self, inputs):
                    return quantizer.encode(inputs)

            got = [ops.convert_to_numpy(v) for v in Holder()(ops.convert_to_tensor(x))]
        finally:
            keras.config.set_dtype_policy(before)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == np.float32
            np.testing.assert_array_equal(g, w)

    def test_an_observer_sees_the_reals_and_lets_them_pass(self, name, role, x):
        quantizer = calibrated(name, role, x)
        seen = []
        quantizer.observer = lambda q, reals: seen.append((q, ops.convert_to_numpy(reals)))
        codes, scale = encode(quantizer, x)
        np.testing.assert_array_equal(codes, x)
        assert scale == 1
        assert seen[0][0] is quantizer
        np.testing.assert_array_equal(seen[0][1], x)

    @pytest.mark.parametrize("bits", [0, 17, 2.5])
    def test_bits_out_of_range_are_refused(self, name, role, bits):
        with pytest.raises(ValueError, match="bits must be a whole number"):
            quantizers.get(name, bits=bits, role=role)

    def test_a_refused_width_changes_nothing(self, name, role, x):
        quantizer = calibrated(name, role, x)
        before = [ops.convert_to_numpy(v) for v in quantizer.variables]
        with pytest.raises(ValueError, match="bits must be a whole number"):
            quantizer.set_bits(17.5)
        assert quantizer.bits == width(name, 4)
        for old, variable in zip(before, quantizer.variables, strict=True):
            np.testing.assert_array_equal(old, ops.convert_to_numpy(variable))


# Means of a filter: export gives a filter of zeros a scale of its own.
@pytest.mark.parametrize(("name", "role"), [c for c in CASES if c[0] not in ("ternary", "levels")])
def test_zeros_alone_start_on_a_scale_of_no_extreme_size(name, role):
    # A tiny one would make the ratios of a sum extreme. Every scale here that fits is 1 / hi.
    quantizer = quantizers.get(name, bits=width(name, 4), role=role)
    zeros = np.zeros((31, 3), np.float32)
    quantizer.build(zeros.shape)
    quantizer.fit_scale(zeros)
    codes, scale = encode(quantizer, zeros)
    assert np.all(np.isfinite(codes * scale))
    assert np.all(scale > 1e-3)


@pytest.mark.parametrize(("name", "role"), [c for c in CASES if c not in WITHOUT_A_GRID])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_static_grid_is_the_one_in_use(name, role, bits, x):
    quantizer = calibrated(name, role, x, bits)
    grid = quantizer.grid()
    codes = np.array(quantizer.static_bounds())
    assert grid.signs == (name == "sign")
    if not grid.signs:
        assert (grid.lo, grid.hi) == (codes[0], codes[1])
    ends = grid.offset + grid.scale * np.array([grid.lo, grid.hi], np.float32)
    np.testing.assert_array_equal(ends, encode(quantizer, x)[1] * codes.astype(np.float32))


@pytest.mark.parametrize(("name", "role"), WITHOUT_A_GRID)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_scale_of_the_kernel_has_no_static_grid(name, role, bits, x):
    with pytest.raises(ValueError, match=r"encode\(kernel\)"):
        calibrated(name, role, x, bits).grid()


@pytest.mark.parametrize("name", [name for name, role in CASES if role == "kernel"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_kernel_codes_fit_their_width(name, bits, x):
    quantizer = calibrated(name, "kernel", x, bits)
    largest = np.abs(encode(quantizer, x)[0]).max()
    assert largest <= 2 ** (quantizer.code_width - 1)
    more = {"dorefa": int(bits > 1), "levels": 8 - bits}.get(name, 0)
    assert quantizer.code_width == width(name, bits) + more


@pytest.mark.once
class TestRegistry:
    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(ValueError, match=r"'minmx'.*Did you mean 'minmax'"):
            quantizers.get("minmx")

    def test_another_type_is_refused(self):
        with pytest.raises(ValueError, match="type int"):
            quantizers.get(8)

    def test_none_and_objects_pass(self):
        given = quantizers.LSQ(3)
        assert quantizers.get(None) is None
        assert quantizers.get(given, bits=8) is given

    def test_a_config_is_read(self):
        config = keras.saving.serialize_keras_object(quantizers.LSQ(3, max_value=6.0))
        assert quantizers.get(config).get_config()["max_value"] == 6.0

    def test_an_unknown_role_is_refused(self):
        with pytest.raises(ValueError, match=r"LSQ: role must be one of .* Got 'bias'"):
            quantizers.LSQ(role="bias")

    @pytest.mark.parametrize("name", ["affine", "PACT", "sign", "channel_balanced"])
    def test_kernels_take_no_quantizer_of_activations(self, name):
        message = rf"{name.lower()!r} quantizes activations alone\. For kernels use one of .*'lsq'"
        with pytest.raises(ValueError, match=message):
            quantizers.get(name, bits=8, role="kernel", axis=-1)

    def test_activations_take_no_quantizer_of_kernels(self):
        with pytest.raises(ValueError, match=r"'ternary' quantizes kernels alone.* use one of"):
            quantizers.get("ternary", bits=8, role="activation")

    def test_an_object_without_the_role_has_another_way_out(self):
        with pytest.raises(ValueError, match="Affine quantizes activations alone"):
            quantizers.get(quantizers.Affine(), role="kernel")

    def test_an_unknown_argument_gets_the_nearest(self):
        message = (
            r"'lsq' has no option 'gradeint'\. It has \['delta', 'enabled', 'gradient', "
            r"'max_value'\]\. Did you mean 'gradient'\?"
        )
        with pytest.raises(ValueError, match=message):
            quantizers.get("lsq", bits=8, role="kernel", gradeint="ewgs")

    def test_scales_are_kept_for_last_axes_only(self):
        with pytest.raises(ValueError, match="last axes"):
            quantizers.LSQ(axis=0).build((3, 4))


def test_a_quantizer_of_kernels_is_no_quantizer_of_activations():
    # 2-bit kernels have codes -1..1, activations -2..1.
    message = r"LSQ: .*role='kernel' is given where role='activation' is needed.*LSQ\(\.\.\., role="
    with pytest.raises(ValueError, match=message):
        layers.Quantize(quantizers.LSQ(2))
    with pytest.raises(ValueError, match="role='activation' is given where role='kernel'"):
        layers.QuantizedDense(2, kernel_quantizer=quantizers.LSQ(2, role="activation"))
    # Earlier versions saved such models; they load as they were.
    config = keras.saving.serialize_keras_object(quantizers.LSQ(2))
    assert layers.QuantizedDense(2, input_quantizer=config).input_quantizer.role == "kernel"


def test_a_config_of_something_else_is_refused():
    config = keras.saving.serialize_keras_object(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="Got <Dense"):
        quantizers.get(config)
