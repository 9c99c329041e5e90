import io
import types

import keras
import numpy as np
import pytest

from keras_lowbit import quantizers
from keras_lowbit.cli import files, making
from keras_lowbit.cli.recipe import changed, read_recipe, without_folders

pytestmark = pytest.mark.once


def read(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return read_recipe(path)


def test_an_empty_recipe_has_the_defaults_and_the_name_of_its_file(tmp_path):
    recipe = read(tmp_path, "")
    assert (recipe.name, recipe.data.name, recipe.train.epochs) == ("r", "digits", 0)


def test_whole_numbers_are_taken_for_reals(tmp_path):
    rate = read(tmp_path, "[train]\nlearning_rate = 1").train.learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[trian]", "unknown section [trian]. Did you mean 'train'?"),
        ("[train]\nepoch = 1", "[train]: unknown key 'epoch'. Did you mean 'epochs'?"),
        ("train = 3", "train must be a section, [train]. Got 3"),
        ("[train\nepochs = 1", "not a TOML file"),
        ("[train]\nepochs = '1'", "epochs must be int. Got '1'"),
        ("[train]\nepochs = true", "epochs must be int. Got True"),
        ("[train]\nlearning_rate = true", "learning_rate must be float. Got True"),
        ("[train]\nepochs = -1", "[train]: epochs must be at least 0. Got -1"),
        ("[pretrain]\nbatch_size = 0", "[pretrain]: batch_size must be at least 1. Got 0"),
        ("[train]\nlearning_rate = nan", "learning_rate must be positive. Got nan"),
        ("[train]\nlearning_rate = inf", "learning_rate must be positive. Got inf"),
        ("[train]\nmomentum = nan", "momentum must lie in 0..1. Got nan"),
        ("[train]\nmomentum = 1.5", "r.toml [train]: momentum must lie in 0..1. Got 1.5"),
        ("[pretrain]\nmomentum = -1", "r.toml [pretrain]: momentum must lie in 0..1. Got -1.0"),
        ("[train]\nseed = 4294967296", "r.toml [train]: seed must be at most 4294967295, 2**32"),
        ("[pretrain]\nseed = 4294967296", "r.toml [pretrain]: seed must be at most 4294967295"),
        ("[data]\nseed = 4294967296", "r.toml [data]: seed must be at most 4294967295"),
        (
            "[quantize]\nscheme = ''\nper_channel = false",
            "[quantize]: per_channel does nothing without a scheme: a float model is made. Got",
        ),
        ("[train]\ndistill = 1.5", "distill must lie in 0..1. Got 1.5"),
        ("[train]\nepochs = 2\nwarmup = 2.0", "warmup must be shorter than the 2 epochs"),
        ("[reconstruct]\nsteps = -1", "[reconstruct]: steps must be at least 0. Got -1"),
        ("[reconstruct]\ndrop = 1.5", "[reconstruct]: drop must lie in 0..1. Got 1.5"),
        ("[refine]\nrates = { bias = 1.0 }", "[refine]: rates are of ['codes_4bit', 'codes_8bit'"),
        ("[refine]\nrates = { codes_4bit = 0.1 }", "[refine]: rates are of ['codes_4bit', 'cod"),
        ("[reconstruct]\nlogit_weight = inf", "[reconstruct]: logit_weight must be at least 0"),
        (
            "[reconstruct]\nblock_steps = { a = 0 }",
            "[reconstruct]: block_steps must be whole numbers, at",
        ),
        (
            '[reconstruct]\nblock_steps = { a = "b" }',
            "[reconstruct]: block_steps must be whole numbers",
        ),
        ("[reconstruct]\nrates = { biases = 0 }", "rates are of ['codes_4bit', 'codes_8bit', 'b"),
        ("[reconstruct]\nrates = { bias = 1.0 }", "rates are of ['codes_4bit', 'codes_8bit', 'b"),
        ("[reconstruct]\nrates = { biases = 'a' }", "rates are of ['codes_4bit', 'codes_8bit', 'b"),
        ("[reconstruct]\nblock_rates = { a = 1 }", "rates are of ['codes_4bit', 'codes_8bit', 'b"),
        (
            "[reconstruct]\nblock_rates = { a = { biases = -1 } }",
            "biases must be a finite number, above 0. Got -1",
        ),
        ("[reconstruct]\nlogit_blocks = 0", "[reconstruct]: logit_blocks must be at least 1"),
        ("[reconstruct]\nviews = -1", "[reconstruct]: views must be at least 0. Got -1"),
        ("[reconstruct]\nzoom = 1.5", "[reconstruct]: zoom must lie above 0 and up to 1. Got 1.5"),
        ("[reconstruct]\nmemory = 0.0", "[reconstruct]: memory must be positive. Got 0.0"),
        ("[quantize]\nscheme = ''\n[reconstruct]\nsteps = 5", "needs a [quantize] scheme"),
        ("[train]\ncutout = -1", "[train]: cutout must be at least 0. Got -1"),
        ("[train]\nmixup = nan", "[train]: mixup must be at least 0.0. Got nan"),
        ("[train]\nmixup = 0.2\naugment = false", "cutout and mixup need augment = true"),
        ("[train]\nbit_descent = 3", "bit_descent must be a table. Got 3"),
        ("[train]\nepochs = 2\nbit_descent = {2 = 4}", "'2' is no epoch of 0..1"),
        ("[train]\nepochs = 2\nbit_descent = {1 = 9}", "bits must be 1..8. Got 9"),
        ("[train]\nepochs = 2\nbit_descent = {1 = true}", "bits must be 1..8. Got True"),
        ("[train]\nxla = 'yes'", "xla must be one of ('auto', 'on', 'off')"),
        ("[pretrain]\nepochs = 1\ndistill = 0.5", "distill and teacher belong to [train]"),
        ("[train]\nepochs = 1\nteacher = 'a.keras'", "teacher needs distill and epochs above 0"),
        (
            "[train]\nepochs = 1\ndistill = 0.5\nteacher = 'a.keras'\n[methods]\nmutual = true",
            "teacher is frozen; mutual trains the float model",
        ),
        ("[pretrain]\nepochs = 1\nteacher = 'a.keras'", "teacher belong to [train]"),
        ("[quantize]\nscheme = 'w4b4'", "[quantize]: Unknown scheme 'w4b4'"),
        ("[quantize]\nscheme = 'w9a9'", "must be a whole number from 1 to 8. Got 9"),
        (
            "[quantize]\nends_bits = 9",
            "[quantize]: Scheme: ends_bits must be a whole number",
        ),
        (
            "[quantize]\nexceptions = { logits = 5 }",
            "[quantize]: Scheme: exceptions['logits']: Bits of a layer are a string such as "
            "'w4a8', or 'float'. Got 5",
        ),
        ("[quantize]\nexceptions = {stem = 'four'}", "Unknown scheme 'four'"),
        (
            "[quantize]\nkernel = 'lsqq'",
            "[quantize]: kernel is no quantizer. Got 'lsqq'. Did you mean 'lsq'?",
        ),
        ("[quantize]\nactivation = ''", "[quantize]: activation is no quantizer. Got ''. Known"),
        ("[quantize]\nmethod = 'best'", "method must be one of"),
        ("[quantize]\nscheme = ''\n[train]\nepochs = 1\nbit_descent = {0 = 8}", "needs a [quan"),
        ("[export]\nweights = ['int5']", "weights must list some of"),
        ("[export]\nweights = ['int8', 'int8']", "each once"),
        ("[export]\ntarget = 'pixel'", "target must be one of ('android', 'builtin', 'coral')"),
        ("[data]\nchannels = 4", "channels must be one of (1, 3)"),
    ],
)
def test_a_slip_in_a_recipe_is_one_error_with_its_place(tmp_path, text, why):
    with pytest.raises(ValueError, match=r"r\.toml") as caught:
        read(tmp_path, text)
    assert why in str(caught.value)


@pytest.mark.parametrize("kernel", ["dorefa", "lsq", "levels"])
def test_a_kernel_beside_a_scheme_that_names_its_own_is_refused(tmp_path, kernel):
    text = f"[quantize]\nscheme = 'wta8'\nkernel = '{kernel}'"
    why = rf"r\.toml \[quantize\]: scheme 'wta8' .* 'ternary'; .* kernel = '{kernel}'"
    with pytest.raises(ValueError, match=why):
        read(tmp_path, text)


def test_a_kernel_is_that_of_the_scheme_or_given(tmp_path):
    def kernel(text):
        return read(tmp_path, f"[quantize]\n{text}").scheme.kernel

    assert kernel("scheme = 'wta8'") == kernel("scheme = 'wta8'\nkernel = 'ternary'") == "ternary"
    assert kernel("scheme = 'w4a4'") == "lsq"
    assert kernel("scheme = 'w4a4'\nkernel = 'dorefa'") == "dorefa"


def test_a_recipe_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read(tmp_path, "")
    assert read_recipe("~/r.toml").name == "r"


def test_recipes_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    path = tmp_path / "r.toml"
    path.write_bytes('[data]\nname = "Blümchen"'.encode())
    monkeypatch.setattr(io, "text_encoding", lambda given, level=2: given or "ascii")
    assert read_recipe(path).data.name == "Blümchen"
    files.write_text("Blümchen", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "Blümchen".encode()
    (tmp_path / "a.json").write_bytes('{"name": "Blümchen"}'.encode())
    assert files.read_json(tmp_path / "a.json") == {"name": "Blümchen"}


def test_a_recipe_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no\.toml: cannot be read \(No such file"):
        read_recipe(tmp_path / "no.toml")


def test_overrides_are_checked_like_the_file(tmp_path):
    recipe = read(tmp_path, "[train]\nepochs = 5\nbit_descent = {4 = 4}")
    with pytest.raises(ValueError, match=r"'4' is no epoch of 0\.\.2"):
        changed(recipe, epochs=3)
    assert changed(recipe, seed=3).pretrain.seed == 3
    compiled = changed(recipe, xla="off")
    assert (compiled.train.xla, compiled.pretrain.xla) == ("off", "off")


def test_the_scheme_gathers_the_quantize_section(tmp_path):
    text = "[quantize]\nscheme='w2a4'\nends_bits=0\nper_channel=false\nexceptions={stem='float'}"
    scheme = read(tmp_path, text).scheme
    assert (scheme.kernel_bits, scheme.activation_bits, scheme.ends_bits) == (2, 4, None)
    assert scheme.widths("stem", is_end=True) is None
    assert not scheme.per_channel


def test_names_of_quantizers_are_taken_in_any_case(tmp_path):
    text = "[quantize]\nkernel='Levels'\nactivation='Channel_Balanced'\n[train]\nepochs=2\n"
    recipe = read(tmp_path, f"{text}[methods]\nbalance=true\nsnap_epoch=1")
    quantize, scheme = recipe.quantize, recipe.scheme
    assert (quantize.kernel, quantize.activation) == ("levels", "channel_balanced")
    assert (scheme.kernel, scheme.activation) == ("levels", "channel_balanced")


def test_without_a_scheme_the_model_stays_float(tmp_path):
    assert read(tmp_path, "[quantize]\nscheme = ''").scheme is None


def test_channels_are_rescaled_by_a_known_rule_and_in_folded_layers_only(tmp_path):
    assert read(tmp_path, "[model]\nfold=true\nrescale='activations'").model.rescale
    with pytest.raises(ValueError, match=r"\[model\]: rescale must be one of .*'activations'"):
        read(tmp_path, "[model]\nfold=true\nrescale='active'")
    with pytest.raises(ValueError, match="rescale needs fold = true"):
        read(tmp_path, "[model]\nrescale='cle'")


def test_a_folded_model_is_rescaled_on_the_calibration_images(tmp_path, monkeypatch):
    seen = []

    def rescaled(model, images, method, **_):
        seen.append((len(images), method, kinds(model)))
        return model

    def kinds(model):
        return {type(layer).__name__ for layer in model.layers}

    monkeypatch.setattr(making, "rescale_pairs", rescaled)
    text = "[model]\nfold=true\nrescale='cle'\n[quantize]\ncalibration_images=3"
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 3)(inputs))
    made = keras.Model(inputs, x)
    dataset = types.SimpleNamespace(x_train=np.zeros((5, 4, 4, 1), np.uint8))
    assert making.folded(made, read(tmp_path, text), dataset) is not made
    assert seen == [(3, "cle", {"InputLayer", "Conv2D"})]


@pytest.mark.once
def test_a_float_recipe_has_nothing_to_distill_into(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[quantize]\nscheme = ''\n[train]\nepochs = 2\ndistill = 0.5\n")
    with pytest.raises(ValueError, match=r"distill needs a \[quantize\] scheme"):
        read_recipe(path)


@pytest.mark.once
def test_options_of_a_wrong_type_are_one_error():
    with pytest.raises(ValueError, match=r"PACT: alpha must be a finite number, above 0\. Got 'x'"):
        quantizers.get("pact", role="activation", alpha="x")
    with pytest.raises(ValueError, match="Quantizer 'affine' cannot be made of"):
        quantizers.get("affine", lo="x")


def test_metrics_that_are_kept_name_files_and_no_folders():
    recipe = {
        "name": "r",
        "data": {"name": "/home/me/cifar.npz", "holdout": 1},
        "model": {"weights": "runs/float.keras"},
        "train": {"teacher": "resnet20_cifar100"},
    }
    metrics = {"accuracy": 0.5, "recipe": recipe}
    kept = without_folders(metrics)
    assert kept["accuracy"] == 0.5
    assert kept["recipe"] == {
        "name": "r",
        "data": {"name": "cifar.npz", "holdout": 1},
        "model": {"weights": "float.keras"},
        "train": {"teacher": "resnet20_cifar100"},
    }
    assert recipe["data"]["name"] == "/home/me/cifar.npz"  # the run's own stay
