"""`quantize`, `evaluate`, `export`, `check`, `inspect`, `zoo`, and what bad input gets."""

import json
import re
import shutil

import keras
import numpy as np
import pytest

import tflite_export
from keras_lowbit import freeze, zoo
from keras_lowbit.cli import files, recipe_checks
from keras_lowbit.integer import build
from keras_lowbit.numerics import ranges
from keras_lowbit_cli import commands
from tflite_export import runtime, targets

pytestmark = pytest.mark.runtime
RELEASED = "resnet8_cifar10_w4a4"
FLOAT = "resnet20_cifar100"


def test_quantize_writes_a_calibrated_model_that_exports(run, made, tmp_path):
    out = tmp_path / "q.keras"
    command = ("quantize", made / "float.keras", "--scheme", "w8a8", "--data", made / "digits.npz")
    outcome = run(*command, "--out", out, "--images", 50)
    assert outcome.code == 0
    assert "calibrated on 50 images" in outcome.out
    assert files.kind(files.load_model(out)) == "quantized"
    assert run("export", out, "--out", tmp_path / "q.tflite").code == 0


def test_quantize_packed_writes_the_release_form(run, made, tmp_path):
    out = tmp_path / "p.keras"
    command = ("quantize", made / "float.keras", "--scheme=w4a4", "--data=digits", "--packed")
    assert run(*command, f"--out={out}", "--images=64").code == 0
    a, b = (tflite_export.convert(files.load_model(p)).content for p in (out, made / "w4a4.keras"))
    assert a == b


def test_evaluate_counts_the_same_right_answers_through_file_and_frozen_model(run, made, tmp_path):
    freeze(files.load_model(made / "w4a4.keras")).save(tmp_path / "frozen.keras")
    paths = (tmp_path / "frozen.keras", made / "w4a4.tflite")
    rows = []
    for path in paths:
        outcome = run("evaluate", path, "--data", "digits", "--images", 60)
        assert outcome.code == 0, outcome.err
        rows.append([cell.strip() for cell in outcome.out.splitlines()[-1].split("|")][4:7])
    assert rows[0] == rows[1]
    assert rows[0][1] == "60"
    assert re.fullmatch(r"\d+\.\d\d% \(\d+\.\d\d\.\.\d+\.\d\d\)", rows[0][2])


def test_evaluate_opens_a_file_once(run, made, monkeypatch):
    opened, real = [], runtime.open_interpreter

    def counted(content, **options):
        opened.append(len(content))
        return real(content, **options)

    monkeypatch.setattr(runtime, "open_interpreter", counted)
    assert run("evaluate", made / "w4a4.tflite", "--data", "digits", "--images", 20).code == 0
    assert opened == [(made / "w4a4.tflite").stat().st_size]


@pytest.mark.parametrize(("name", "kind"), [("float.keras", "float"), ("w4a4.keras", "quantized")])
def test_evaluate_says_what_kind_of_model_it_ran(run, made, name, kind):
    outcome = run("evaluate", made / name, "--data", "digits", "--images", 20)
    assert (outcome.code, f"| {kind} " in outcome.out) == (0, True)


@pytest.mark.parametrize("flags", [[], ["--input_type=uint8", "--data=digits"]])
def test_export_verifies_every_code_and_writes_the_file(run, made, tmp_path, flags):
    out = tmp_path / "m.tflite"
    outcome = run("export", made / "w4a4.keras", "--out", out, "--verify_images", 3, *flags)
    assert outcome.code == 0, outcome.err
    assert "0 wrong of" in outcome.out
    assert "3 images" in outcome.out
    assert out.read_bytes()[4:8] == b"TFL3"


def test_export_with_wrong_codes_fails_and_writes_nothing(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(tflite_export.ExportResult, "mismatches", 7)
    outcome = run("export", made / "w4a4.keras", "--out", tmp_path / "m.tflite")
    assert outcome.code == 1
    assert outcome.error.startswith("7 wrong codes")
    assert list(tmp_path.iterdir()) == []


def test_a_container_that_rounds_otherwise_is_written_with_its_count(
    run, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(tflite_export.ExportResult, "mismatches", 7)
    out = tmp_path / "m.tflite"
    outcome = run("export", made / "w4a4.keras", "--out", out, "--weights", "int4_all")
    assert (outcome.code, out.is_file()) == (0, True)
    assert "7 codes differ: the kernels of int4_all round otherwise" in outcome.out


def test_check_finds_nothing_against_a_plain_model(run, made):
    outcome = run("check", made / "float.keras", "--target", "builtin")
    assert (outcome.code, outcome.out.splitlines()) == (
        0,
        [f"builtin: no objections to {made / 'float.keras'}"],
    )


def test_everything_that_can_be_chosen_can_be_asked_for():
    assert tuple(targets.TARGETS) == commands.TARGETS
    assert commands.METHODS == ranges.METHODS
    assert (commands.WEIGHTS, commands.TYPES) == (build.WEIGHTS, build.TYPES)
    assert commands.XLA == recipe_checks.XLA


def test_check_names_the_layer_that_has_no_integer_form(run, tmp_path):
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.Activation("tanh", name="squash")(x)
    x = keras.layers.Conv2D(4, 3, name="conv2")(x)
    keras.Model(inputs, x).save(tmp_path / "odd.keras")
    outcome = run("check", tmp_path / "odd.keras")
    assert outcome.code == 1
    assert "squash" in outcome.out


def test_check_asks_for_the_file_that_export_would_write(run, made):
    outcome = run("check", made / "w4a4.keras", "--target=coral", "--weights=int4_all")
    assert outcome.code == 1
    assert "use weights='int8'" in outcome.out


def test_inspect_shows_layers_bits_and_bytes_of_a_keras_file(run, made):
    outcome = run("inspect", made / "w4a4.keras")
    assert outcome.code == 0
    mix = next(line for line in outcome.out.splitlines() if line.startswith("| mix"))
    assert [cell.strip() for cell in mix.split("|")][2:5] == ["Conv2D", "4", "4"]
    assert "quantized Keras model" in outcome.out


def test_inspect_shows_the_codes_of_a_tflite(run, made):
    outcome = run("inspect", made / "w4a4.tflite")
    assert outcome.code == 0
    assert "XNNPACK" in outcome.out
    mix = next(line for line in outcome.out.splitlines() if "int8 6x1x1x6" in line)
    assert "CONV_2D" in mix
    low, high = map(int, re.search(r"(-?\d+)\.\.(-?\d+), ", mix).groups())
    assert -128 <= low < high <= 127


def test_inspect_reads_int4_kernels(run, made, tmp_path):
    out = tmp_path / "i4.tflite"
    assert run("export", made / "w4a4.keras", "--out", out, "--weights=int4").code == 0
    outcome = run("inspect", out)
    row = next(line for line in outcome.out.splitlines() if "int4 6x6" in line)
    assert "FULLY_CONNECTED" in row
    low, high, bits = map(int, re.search(r"(-?\d+)\.\.(-?\d+), (\d) bits", row).groups())
    graph = tflite_export.convert(files.load_model(made / "w4a4.keras"), weights="int4").graph
    kernel = next(op.kernel for op in graph if getattr(op, "storage", "") == "int4")
    assert (low, high) == (kernel.min(), kernel.max())
    assert bits <= 4


def rewritten(content, change):
    """A file after `change(model, schema)` of its contents, as other converters may write it."""
    flatbuffers = pytest.importorskip("flatbuffers")
    schema = runtime.require("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content)
    change(model, schema)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_inspect_reads_files_without_shapes_and_names(run, made, tmp_path):
    def bare(model, schema):
        (graph,) = model.subgraphs
        last = graph.tensors[graph.outputs[0]]
        last.shape, last.name = None, None

    path = tmp_path / "bare.tflite"
    path.write_bytes(rewritten((made / "w4a4.tflite").read_bytes(), bare))
    outcome = run("inspect", path)
    assert outcome.code == 0, outcome.err
    assert "FULLY_CONNECTED" in outcome.out


def test_inspect_shows_files_that_nothing_here_can_run(run, made, tmp_path):
    def foreign(model, schema):
        code = model.operatorCodes[0]
        code.builtinCode, code.customCode = schema.BuiltinOperator.CUSTOM, b"TheirOwn"
        code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM

    path = tmp_path / "foreign.tflite"
    path.write_bytes(rewritten((made / "w4a4.tflite").read_bytes(), foreign))
    outcome = run("inspect", path)
    assert outcome.code == 0, outcome.err
    assert "CUSTOM TheirOwn" in outcome.out
    assert "XNNPACK" not in outcome.out
    last = outcome.out.splitlines()[-1]
    assert last.startswith("It cannot be run here: LiteRT refuses this file: ")
    assert "TheirOwn" in last


def test_inspect_shows_a_frozen_model(run, made, tmp_path):
    freeze(files.load_model(made / "w4a4.keras")).save(tmp_path / "f.keras")
    outcome = run("inspect", tmp_path / "f.keras")
    assert (outcome.code, "frozen Keras model" in outcome.out) == (0, True)


def test_paths_begin_in_the_home_folder(run, made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "~/w4a4.tflite").code == 0
    assert run("inspect", "~/w4a4.keras").code == 0
    assert run("check", "~/w4a4.keras").code == 0
    quantize = ("quantize", "~/float.keras", "--data=digits", "--images=16")
    assert run(*quantize, f"--out={tmp_path / 'q1.keras'}").code == 0
    for name in ("~/w4a4.tflite", "~/w4a4.keras"):
        outcome = run("evaluate", name, "--data", "~/digits.npz", "--images", 20)
        assert outcome.code == 0, outcome.err
    source = str(made / "w4a4.keras")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("export", source, "--out=~/x.tflite", "--verify_images=0").code == 0
    shutil.copy(made / "float.keras", tmp_path / "w.keras")
    quantize = ("quantize", made / "float.keras", "--data=digits", "--images=16")
    assert run(*quantize, "--weights=~/w.keras", "--out=~/q2.keras").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"x.tflite", "q1.keras", "q2.keras", "w.keras"}


@pytest.mark.once
def test_zoo_list_shows_released_models_by_pattern(run):
    def names(*pattern):
        outcome = run("zoo", "list", *pattern)
        assert outcome.code == 0
        return [line.split("|")[1].strip() for line in outcome.out.splitlines() if "%" in line]

    assert names() == zoo.list()
    assert names("resnet8*") == zoo.list("resnet8*") != zoo.list()


@pytest.mark.once
def test_zoo_info_says_what_is_known(run):
    outcome = run("zoo", "info", RELEASED)
    assert (outcome.code, outcome.out) == (0, f"{zoo.info(RELEASED)}\n")


def test_zoo_export_writes_the_file_of_the_loaded_model(run, tmp_path):
    out = tmp_path / "m.tflite"
    flags = ("--weights=int4", "--verify_images=1", "--input_type=uint8")
    outcome = run("zoo", "export", RELEASED, "--out", out, *flags)
    assert outcome.code == 0, outcome.err
    assert "0 wrong of" in outcome.out
    options = {"weights": "int4", "input_type": "uint8"}
    assert out.read_bytes() == tflite_export.convert(zoo.load(RELEASED), **options).content


BAD = [
    (["inspect", "~nosuch/x.keras"], "~nosuch/x.keras: no home folder is known for ~nosuch"),
    (["check", "~nosuch/x.keras"], "~nosuch/x.keras: no home"),
    (["evaluate", "~nosuch/x.tflite", "--data=digits"], "~nosuch/x.tflite: no home"),
    (["evaluate", "{made}/w4a4.keras", "--data=~nosuch/x"], "~nosuch/x: no home"),
    (["export", "{made}/w4a4.keras", "--out=~nosuch/x.tflite"], "~nosuch/x.tflite: no home"),
    (["quantize", "{made}/float.keras", "--data=digits", "--out=~nosuch/q.keras"], "no home"),
    (
        ["quantize", "resnet8", "--data=digits", "--out={tmp}/q.keras", "--weights=~nosuch/w.h5"],
        "~nosuch/w.h5: no home",
    ),
    (["train", "{tmp}/typo.toml", "--out=~nosuch/out"], "unknown key 'epoch'"),
    (["train", "{tmp}/nobody.toml"], "nobody [data]: ~nosuch/x: no home"),
    (["train", "{tmp}/small.toml"], "small [data]: digits has images of 8x8 pixels, and size is"),
    (["inspect", "{tmp}/no.keras"], "no.keras: no such file"),
    (["inspect", "{tmp}/no.tflite"], "no.tflite: no such file"),
    (["inspect", "{tmp}/folder.keras"], "folder.keras is a folder; expected a .keras file"),
    (["inspect", "{tmp}/folder.tflite"], "folder.tflite is a folder; expected a .tflite file"),
    (["inspect", "{tmp}/empty"], "empty is a folder; expected a .keras or a .tflite file"),
    (["evaluate", "{tmp}/folder.keras", "--data=digits"], "folder.keras is a folder"),
    (["evaluate", "{tmp}/folder.tflite", "--data=digits"], "folder.tflite is a folder"),
    (["inspect", "{tmp}/notes.txt"], "expected a .keras or a .tflite file"),
    (["inspect", "{tmp}/cut.keras"], "cut.keras is damaged or no .keras file"),
    (["inspect", "{tmp}/flipped.keras"], "flipped.keras is damaged"),
    (["inspect", "{tmp}/text.keras"], "text.keras is damaged or no .keras file"),
    (["inspect", "{tmp}/other.keras"], "other.keras is damaged or no .keras file"),
    (["inspect", "{tmp}/cut.tflite"], "cut.tflite is damaged"),
    (["inspect", "{tmp}/text.tflite"], "it lacks the identifier TFL3"),
    (["evaluate", "{tmp}/cut.tflite", "--data=digits"], "cut.tflite: LiteRT refuses this file"),
    (["evaluate", "{made}/w4a4.keras"], "--data must be given"),
    (["evaluate", "{made}/w4a4.keras", "--data=digit"], "Did you mean 'digits'?"),
    (["evaluate", "{made}/w4a4.keras", "--data={tmp}/cut.npz"], "cannot be read as .npz"),
    (["evaluate", "{made}/w4a4.keras", "--data={tmp}/big.npz"], "images of 9x9x1 pixels"),
    (["evaluate", "{made}/w4a4.tflite", "--data={tmp}/big.npz"], "takes 8x8x1"),
    (["evaluate", "{made}/w4a4.keras", "--data={tmp}/empty"], "has no folders in it"),
    (["evaluate", "{made}/w4a4.keras", "--data={tmp}/folder"], "has no images in it"),
    (["evaluate", "{tmp}/raw.keras", "--data=digits"], "was never calibrated"),
    (["quantize", "{made}/float.keras", "--data=digits"], "--out must be given"),
    (["quantize", "{made}/float.keras", "--data=digits", "--out={tmp}/q.h5"], "end in .keras"),
    (["quantize", "{made}/float.keras", "--data=digits", "--out={tmp}/no/q.keras"], "no folder"),
    (["quantize", "resnet9", "--data=digits", "--out={tmp}/q.keras"], "Did you mean"),
    (["quantize", "resnet8", "--data=digits", "--out={tmp}/q.keras"], "with --weights"),
    (
        ["quantize", "resnet8", "--data=digits", "--out={tmp}/q.keras", "--weights={tmp}/no.h5"],
        "no.h5: no such file of weights",
    ),
    (
        ["quantize", "resnet8", "--data=digits", "--out={tmp}/q.keras", "--weights={tmp}/cut.npz"],
        "cut.npz is damaged or no .npz file",
    ),
    (
        ["quantize", "{made}/float.keras", "--data=digits", "--out={tmp}/q.keras", "--scheme=w4x"],
        "Unknown scheme 'w4x'",
    ),
    (
        ["quantize", "{made}/w4a4.keras", "--data=digits", "--out={tmp}/q.keras"],
        "is quantized already",
    ),
    (
        ["quantize", "{made}/float.keras", "--data={tmp}/nan.npz", "--out={tmp}/q.keras"],
        "contains NaN",
    ),
    (["quantize", "{made}/float.keras", "--method=best"], "value should be one of"),
    (["export", "{made}/w4a4.keras"], "--out must be given"),
    (["export", "{made}/float.keras", "--out={tmp}/x.tflite"], "is a float model"),
    (["export", "{made}/w4a4.keras", "--out={tmp}/there.tflite"], "exists already"),
    (["export", "{tmp}/raw.keras", "--out={tmp}/x.tflite"], "calibrat"),
    (["export", "{made}/w4a4.keras", "--out={tmp}/x.tflite", "--target=pixel"], "android|builtin"),
    (["export", "{made}/w4a4.keras", "--out={tmp}/x.tflite", "--verify_images=-1"], "verify_imag"),
    (
        ["export", "{made}/w4a4.keras", "--out={tmp}/x.tflite", "--data={tmp}/big.npz"],
        "images of 9x9x1 pixels",
    ),
    (
        ["export", "{made}/w4a4.keras", "--out={tmp}/x.tflite", "--verify_images=0", "--data=no"],
        "--data is to verify on, and --verify_images=0 leaves that out. Give one of the two",
    ),
    (["check", "{made}/w4a4.tflite"], "expected a .keras file"),
    (["zoo", "info", "resnet8_cifar10_w4a3"], "w4a3'. Did you mean 'resnet8_cifar10_w"),
    (["zoo", "export", "resnet8_cifar"], "No released model 'resnet8_cifar'"),
    (["zoo", "export", RELEASED], "--out must be given"),
    (["zoo", "export", RELEASED, "--out={tmp}/there.tflite"], "exists already"),
    (
        ["zoo", "export", FLOAT, "--out={tmp}/x.tflite"],
        f"{FLOAT} is a float model: keras-lowbit quantize makes one to export",
    ),
    (["zoo", "list", "vgg*"], "no released model matches 'vgg*'; known: "),
    (["zoo", "list", "a", "b"], "takes one [PATTERN]. Got a b"),
    (["zoo", "lst"], "unknown command 'zoo lst'. Did you mean 'zoo list'?"),
    (["train", "{tmp}/no.toml"], "no.toml: cannot be read"),
    (["train", "{tmp}/typo.toml"], "unknown key 'epoch'"),
    (["train"], "takes one CONFIG. Got nothing"),
    (["inspect", "a", "b"], "takes one FILE. Got a b"),
    (["trian", "x"], "Did you mean 'train'?"),
    (["train", "x", "--epoch=3"], "Did you mean: epochs"),
    (["train", "x", "--epochs=three"], "epochs"),
]


@pytest.fixture
def bad_files(made, tmp_path):
    """Everything that can be wrong with a file."""
    from keras_lowbit import quantize_model

    model, file = (made / "w4a4.keras").read_bytes(), (made / "w4a4.tflite").read_bytes()
    (tmp_path / "cut.keras").write_bytes(model[: len(model) // 2])
    # The biggest member, model.weights.h5, lies last.
    flipped = bytearray(model)
    flipped[len(model) * 2 // 3] ^= 255
    (tmp_path / "flipped.keras").write_bytes(flipped)
    (tmp_path / "text.keras").write_text("no model")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "other.npz").rename(tmp_path / "other.keras")
    (tmp_path / "cut.tflite").write_bytes(file[: len(file) // 3])
    (tmp_path / "text.tflite").write_text("no model at all")
    (tmp_path / "there.tflite").write_text("precious")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "typo.toml").write_text("[train]\nepoch = 3\n")
    (tmp_path / "nobody.toml").write_text('[data]\nname = "~nosuch/x"\n')
    (tmp_path / "small.toml").write_text("[data]\nsize = 4\n")
    (tmp_path / "cut.npz").write_bytes((made / "digits.npz").read_bytes()[:900])
    labels = np.arange(20) % 10
    big = np.zeros((20, 9, 9, 1), "uint8")
    np.savez(tmp_path / "big.npz", x_train=big, y_train=labels, x_test=big, y_test=labels)
    nan = np.full((20, 8, 8, 1), np.nan, "float32")
    np.savez(tmp_path / "nan.npz", x_train=nan, y_train=labels, x_test=nan, y_test=labels)
    for name in ("empty", "folder.keras", "folder.tflite"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    raw = quantize_model(keras.models.load_model(made / "float.keras", compile=False), "w4a4")
    raw.save(tmp_path / "raw.keras")
    return tmp_path


def test_bad_input_is_one_line_on_stderr_exit_code_2_and_untouched_files(
    run, made, bad_files, contents
):
    before = contents(bad_files), contents(made)
    wrong = {}
    for arguments, why in BAD:
        outcome = run(*(a.format(tmp=bad_files, made=made) for a in arguments))
        lines = [x for x in outcome.err.splitlines() if not x.startswith("INFO: ")]
        fits = outcome.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        if not fits or why not in lines[0]:
            wrong[" ".join(arguments)] = (outcome.code, outcome.err)
    assert wrong == {}
    assert (contents(bad_files), contents(made)) == before


def test_overwrite_replaces_a_file(run, made, tmp_path):
    out = tmp_path / "x.tflite"
    out.write_text("old")
    assert run("export", made / "w4a4.keras", "--out", out, "--overwrite").code == 0
    assert out.read_bytes()[4:8] == b"TFL3"


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(run, made, tmp_path, command, small_disk):
    suffix = {"export": ".tflite", "quantize": ".keras"}[command]
    source = made / {"export": "w4a4.keras", "quantize": "float.keras"}[command]
    out = tmp_path / f"x{suffix}"
    out.write_text("old")
    data = ["--data=digits"] if command == "quantize" else ["--verify_images=0"]
    with small_disk(2000):
        outcome = run(command, source, "--out", out, "--overwrite", *data)
    assert outcome.code == 2, outcome.err
    assert f"{out}: File too large; nothing was written" in outcome.err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {out.name: b"old"}


def test_json_files_are_whole_or_damaged_in_words(tmp_path):
    path = tmp_path / "a.json"
    files.write_json({"a": np.float32(0.5)}, path)
    assert json.loads(path.read_text()) == {"a": 0.5}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        files.read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json is damaged \(no object\)"):
        files.read_json(path)


def test_evaluate_refuses_data_of_more_classes(run, made, tmp_path):
    digits = np.load(made / "digits.npz")
    more = dict(digits) | {"y_train": np.where(digits["y_train"] == 9, 10, digits["y_train"])}
    np.savez(tmp_path / "more.npz", **more)
    for name in ("w4a4.keras", "w4a4.tflite"):
        outcome = run("evaluate", made / name, "--data", tmp_path / "more.npz")
        assert outcome.code == 2
        assert "tells 10 classes apart; more.npz has 11" in outcome.error


def test_what_answers_with_no_classes_is_one_error(run, made, tmp_path):
    model = files.load_model(made / "float.keras")
    head, body = model.output, model.get_layer("relu2").output
    for name, outputs, shapes in (
        ("two", [head, keras.layers.Dense(10)(head)], "(None, 10) and (None, 10)"),
        ("map", keras.layers.Conv2D(10, 1)(body), "(None, 3, 3, 10)"),
    ):
        path = tmp_path / f"{name}.keras"
        keras.Model(model.input, outputs, name=name).save(path)
        small, file = tmp_path / f"small_{name}.keras", tmp_path / f"{name}.tflite"
        quantize = ("quantize", path, "--scheme=w8a8", "--data=digits", "--images=32")
        assert run(*quantize, "--out", small).code == 0
        assert run("export", small, "--out", file, "--verify_images=1").code == 0
        for given in (path, small, file):
            outcome = run("evaluate", given, "--data=digits")
            assert outcome.code == 2, outcome.err
            wanted = shapes.replace("None", "1" if given == file else "None")
            assert f"{given} gives {wanted}; accuracy is of one output" in outcome.error


def test_labels_of_a_folder_are_those_of_all_classes_or_none(run, made, tmp_path):
    image = pytest.importorskip("PIL.Image")
    digits = np.load(made / "digits.npz")
    for digit in range(10):
        for i, x in enumerate(digits["x_test"][digits["y_test"] == digit][:5]):
            path = tmp_path / "images" / str(digit) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(x[..., 0]).save(path)
    for name in ("w4a4.keras", "w4a4.tflite"):
        assert run("evaluate", made / name, "--data", tmp_path / "images").code == 0
    shutil.rmtree(tmp_path / "images" / "3")
    for name in ("w4a4.keras", "w4a4.tflite"):
        outcome = run("evaluate", made / name, "--data", tmp_path / "images")
        assert outcome.code == 2
        assert "tells 10 classes apart; images has folders of 9" in outcome.error
        assert "labels are the places of their names" in outcome.error
