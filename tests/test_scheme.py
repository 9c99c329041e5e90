import pytest

from keras_lowbit.scheme import Scheme, Widths

pytestmark = pytest.mark.once


def test_a_short_name_gives_the_bits():
    scheme = Scheme.of("W4a8")
    assert (scheme.kernel_bits, scheme.activation_bits) == (4, 8)
    assert scheme.ends_bits == 8


@pytest.mark.parametrize(
    ("given", "near"), [("w4b4", "w4a4"), ("w4 a8", "w4a8"), ("2a2", "w2a2"), ("w4", "w4a4")]
)
def test_an_unknown_name_gets_the_nearest(given, near):
    with pytest.raises(ValueError, match=f"Unknown scheme '{given}'.* Did you mean '{near}'"):
        Scheme.of(given)


@pytest.mark.parametrize("given", ["w0a8", "w9a8", "w8a0", "w8a16"])
def test_bits_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"(kernel|activation)_bits.* must be .*from 1 to"):
        Scheme.of(given)


@pytest.mark.parametrize("bits", [-1, 0, 9, 2.5, True])
def test_bits_of_fields_are_checked(bits):
    for key in ("kernel_bits", "activation_bits", "ends_bits"):
        message = rf"^Scheme: {key} must be a whole number from 1 to 8\. Got {bits}$"
        with pytest.raises(ValueError, match=message):
            Scheme(**{key: bits})


def test_an_unknown_key_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'kernel_bit'.*Did you mean 'kernel_bits'"):
        Scheme.of({"kernel_bit": 4, "activation_bits": 4})
    with pytest.raises(ValueError, match=r"unknown key 'kernel_bit'.*Did you mean 'kernel_bits'"):
        Scheme.of({"kernel_bit": 4})


def test_bits_of_a_pattern_that_are_no_string_are_refused_by_its_name():
    with pytest.raises(ValueError, match=r"exceptions\['logits'\]: Bits of a layer are a .* Got 5"):
        Scheme.of({"*": "w4a4", "logits": 5})


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"A scheme is a string such as 'w4a4'.* Got 4"):
        Scheme.of(4)


def test_patterns_override_in_order_and_none_stays_float():
    scheme = Scheme.of({"*": "w4a4", "block*": "w2a8", "block_1": None})
    assert scheme.widths("conv", is_end=False) == Widths(4, 4)
    assert scheme.widths("block_2", is_end=False) == Widths(2, 8)
    assert scheme.widths("block_1", is_end=False) is None


def test_ends_have_their_own_width_unless_a_pattern_names_them():
    scheme = Scheme.of({"*": "w2a2", "head": "w4a4"})
    assert scheme.widths("stem", is_end=True) == Widths(8, 8)
    assert scheme.widths("head", is_end=True) == Widths(4, 4)
    flat = Scheme(kernel_bits=2, activation_bits=2, ends_bits=None)
    assert flat.widths("stem", is_end=True) == Widths(2, 2)


def test_ends_may_stay_float():
    scheme = Scheme(2, 2, ends_bits="float", exceptions={"head": "w8a8"})
    assert scheme.widths("stem", is_end=True) is None
    assert scheme.widths("conv", is_end=False) == Widths(2, 2)
    assert scheme.widths("head", is_end=True) == Widths(8, 8)
    with pytest.raises(ValueError, match=r"ends_bits is a width.*or 'float'\. Got 'w8a8'"):
        Scheme(ends_bits="w8a8")


def test_a_mapping_without_star_means_8_bits_elsewhere():
    assert Scheme.of({"head": None}).widths("conv", is_end=False) == Widths(8, 8)


def test_exceptions_are_checked_at_once():
    place = r"^Scheme: exceptions\['head'\]: "
    with pytest.raises(ValueError, match=f"{place}Unknown scheme 'w4x4'"):
        Scheme(exceptions={"head": "w4x4"})
    with pytest.raises(ValueError, match=f"{place}Unknown scheme 'w4x4'"):
        Scheme.of({"head": "w4x4"})
    with pytest.raises(ValueError, match=rf"{place}.*such as 'w4a8', or 'float'\. Got 4"):
        Scheme(exceptions={"head": 4})
    with pytest.raises(ValueError, match=f"{place}kernel_bits must be .* from 1 to 8. Got 99"):
        Scheme(exceptions={"head": "w99a1"})


def test_an_exception_stays_float_by_name_or_by_none():
    named = Scheme(exceptions={"head": "float"})
    assert named == Scheme(exceptions={"head": None})
    assert named.widths("head", is_end=True) is None
    assert Scheme.of({"*": "w4a4", "head": "float"}).widths("head", is_end=True) is None


def test_patterns_that_match_nothing_are_found():
    scheme = Scheme.of({"*": "w4a4", "haed": None, "b?": "w8a8"})
    assert scheme.unused_exceptions(["head", "b1"]) == ["haed"]


def test_a_scheme_of_a_scheme_is_itself():
    scheme = Scheme(kernel_bits=3)
    assert Scheme.of(scheme) is scheme


def test_a_t_gives_ternary_kernels_with_8_bit_ends():
    scheme = Scheme.of("wtA8")
    assert (scheme.kernel, scheme.kernel_bits, scheme.activation_bits) == ("ternary", 2, 8)
    assert scheme.widths("conv", is_end=False) == Widths(2, 8)
    assert scheme.widths("stem", is_end=True) == Widths(8, 8, "lsq")
    assert Scheme.of("wta4").activation_bits == 4


def test_ternary_layers_and_others_live_side_by_side():
    few = Scheme.of({"*": "w4a4", "block*": "wta4"})
    assert few.widths("block_1", is_end=False) == Widths(2, 4, "ternary")
    assert few.widths("conv", is_end=False) == Widths(4, 4)
    most = Scheme.of({"*": "wta8", "block*": "w4a8"})
    assert most.widths("block_1", is_end=False) == Widths(4, 8, "lsq")


def test_ternary_codes_have_no_other_width():
    assert Scheme(kernel="ternary").kernel_bits == 2
    with pytest.raises(ValueError, match=r"ternary codes take 2 bits\. Got kernel_bits=4"):
        Scheme(4, kernel="ternary")


def test_ends_beside_learned_levels_are_uniform():
    scheme = Scheme(2, 4, kernel="levels")
    assert scheme.widths("stem", is_end=True) == Widths(8, 8, "lsq")
    assert scheme.widths("conv", is_end=False) == Widths(2, 4)


def test_binary_activations_are_signs_where_asked_for():
    scheme = Scheme(1, 1, binary_activation="sign", activation_options={"max_value": 4.0})
    assert scheme.activation_of(1) == ("sign", {})
    assert scheme.activation_of(8) == ("lsq", {"max_value": 4.0})
    assert Scheme.of("w1a1").activation_of(1) == ("lsq", {})
    few = Scheme(4, 4, binary_activation="sign", exceptions={"block*": "w1a1"})
    assert few.activation_of(4) == ("lsq", {})


def test_signs_without_one_bit_are_refused():
    with pytest.raises(ValueError, match=r"binary_activation must be one of .* Got 'signs'"):
        Scheme(1, 1, binary_activation="signs")
    with pytest.raises(ValueError, match=r"'sign' needs activations of 1 bit.* activation_bits=4"):
        Scheme(1, 4, binary_activation="sign")
    with pytest.raises(ValueError, match=r"1-bit activations only.* binary_activation='sign'"):
        Scheme(1, 1, activation="sign")


def test_names_of_quantizers_are_taken_in_any_case():
    assert Scheme(kernel="LSQ", activation="LSQ") == Scheme()
    assert Scheme(kernel="Ternary").kernel_bits == 2
    assert Scheme(8, 8, kernel="Levels").widths("stem", is_end=True) == Widths(8, 8, "lsq")
    assert Scheme(4, 8, kernel="DoReFa").widths("stem", is_end=True) == Widths(8, 8, "lsq")
    with pytest.raises(ValueError, match="1-bit activations only"):
        Scheme(1, 1, activation="Sign")


def test_eight_bit_layers_beside_dorefa_take_another_quantizer():
    scheme = Scheme(4, 4, kernel="dorefa", exceptions={"a": "w8a8", "b": "w3a3"})
    assert scheme.widths("end", is_end=True).kernel == "lsq"
    assert scheme.widths("a", is_end=False).kernel == "lsq"
    assert scheme.widths("b", is_end=False).kernel is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_options": {"bits": 2}}, "bits follows from the scheme"),
        ({"exceptions": ["a"]}, r"exceptions is a mapping\. Got \['a'\]"),
        ({"exceptions": {5: "w4a4"}}, r"names in exceptions are strings\. Got 5"),
        ({"activation_options": {5: 1}}, r"names in activation_options are strings\. Got 5"),
        ({"kernel": None}, r"^Scheme: kernel is the name of a quantizer, .*\. Got None"),
        ({"activation": 5}, r"^Scheme: activation is the name of a quantizer, .*\. Got 5"),
    ],
)
def test_fields_of_a_wrong_form_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)
