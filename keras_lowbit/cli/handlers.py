"""What each command does, from its argument and flags to its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import tflite_export
from keras_lowbit import packed, zoo
from keras_lowbit.analysis import summary
from keras_lowbit.cli import files, measure, report, trainer
from keras_lowbit.cli.allocator import keep_memory
from keras_lowbit.cli.inspection import inspect as inspection
from keras_lowbit.cli.pixels import Intake, range_of
from keras_lowbit.cli.recipe import changed, read_recipe
from keras_lowbit.data.sources import is_folder
from keras_lowbit.paths import expanded
from keras_lowbit.progress import fit_verbosity, table
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import calibrate, quantize_model
from keras_lowbit.transform.ready import uncalibrated
from tflite_export import runtime

FAILED = 1


def train(config: str, flags) -> int:
    """`keras-lowbit train`."""
    for name in ("data", "weights", "out"):
        if flags[name].value == "":
            raise ValueError(f"--{name} is empty. Give a name, or leave the flag out")
    recipe = changed(
        read_recipe(config),
        epochs=flags.epochs,
        seed=flags.seed,
        xla=flags.xla,
        data=flags.data,
        weights=flags.weights,
    )
    out = expanded(flags.out or Path("runs", recipe.name))
    keep_memory()
    metrics = trainer.run_recipe(recipe, out, verbose=fit_verbosity(), tune=flags.tune)
    print(f"Results: {out}")
    return FAILED if report.wrong_codes(metrics) else 0


def quantize(name: str, flags) -> int:
    """`keras-lowbit quantize`."""
    _required(flags, "data", "out")
    out = files.checked_output(flags.out, ".keras", flags.overwrite)
    scheme = Scheme.of(flags.scheme)
    known = name in zoo.ARCHITECTURES
    if known and not flags.weights:
        raise ValueError(f"{name} is an architecture: give its float weights with --weights")
    if known:
        dataset = files.load_data(flags.data, (None, None, None), name)
        options = {"input_shape": dataset.image_shape, "classes": dataset.num_classes}
        model = files.build_float(name, flags.weights, **options)
    else:
        model = files.build_float(name, flags.weights or "")
        dataset = files.load_data(flags.data, files.image_shape(model), name)
    images = np.asarray(dataset.x_train[: flags.images])
    made = quantize_model(model, scheme, input_range=range_of(dataset))
    made = calibrate(made, images, method=flags.method)
    summary(made)
    if flags.packed:
        packed.save_packed(made, out)
    else:
        files.save(made, out)
    print(f"{out}: {out.stat().st_size:,} bytes, calibrated on {len(images)} images")
    return 0


def evaluate(name: str, flags) -> int:
    """`keras-lowbit evaluate`."""
    _required(flags, "data")
    path = expanded(name)
    if path.suffix == ".tflite":
        session, shape, intake = _opened(path)
        kind = ".tflite"
        dataset = files.load_data(flags.data, shape, name)
        x, y = _test_images(dataset, flags.images)
        classes = measure.file_classes(session, path)
        measure.check_classes(path, classes, dataset, is_folder(flags.data))
        answers = measure.file_answers(session, x, f"run {path.name}", intake=intake)
    else:
        model = files.load_model(path)
        kind = files.kind(model)
        if kind == "quantized" and uncalibrated(model):
            raise ValueError(f"{path} was never calibrated: keras-lowbit quantize, or calibrate")
        dataset = files.load_data(flags.data, files.image_shape(model), name)
        x, y = _test_images(dataset, flags.images)
        classes = measure.output_classes(model, path)
        measure.check_classes(path, classes, dataset, is_folder(flags.data))
        answers = measure.keras_answers(model, x, what=f"run {path.name}")
    scored = measure.score(answers, y)
    row = (path, kind, f"{path.stat().st_size:,}", scored["right"], len(y), measure.shown(scored))
    columns = ("file", "kind", "bytes", "right", "images", "accuracy (95 %)")
    print(table(str(dataset), columns, [row]))
    return 0


def export(name: str, flags) -> int:
    """`keras-lowbit export`."""
    out = _tflite_output(flags)
    model = files.load_model(name)
    if files.kind(model) == "float":
        raise _is_float(name)
    return _exported(model, name, out, flags)


def check(name: str, flags) -> int:
    """`keras-lowbit check`."""
    model = files.load_model(name)
    if files.kind(model) == "frozen":
        raise ValueError(f"{name} is frozen already: export it")
    found = tflite_export.check(model, flags.target, **_containers(flags))
    for objection in found:
        print(objection)
    count = f"{len(found)} objection{'s' if len(found) > 1 else ''}" if found else "no objections"
    print(f"{flags.target}: {count} to {name}")
    return FAILED if found else 0


def _containers(flags):
    names = ("weights", "input_type", "output_type")
    return {name: getattr(flags, name) for name in names}


def inspect(name: str, flags) -> int:
    """`keras-lowbit inspect`."""
    del flags
    print(inspection(expanded(name)))
    return 0


def zoo_list(pattern: str, flags) -> int:
    """`keras-lowbit zoo list`."""
    del flags
    names = zoo.list(pattern or "*")
    if not names:
        raise ValueError(f"no released model matches {pattern!r}; known: {', '.join(zoo.list())}")
    rows = []
    for entry in map(zoo.info, names):
        file, size = next(iter(entry.file_bytes.items()), ("float", None))
        cells = (f"{entry.accuracy[file]:.2%}", f"{entry.bytes:,}", f"{size:,}" if size else "")
        rows.append((entry.name, entry.scheme, entry.data, *cells))
    print(table("", ("model", "bits", "data", "accuracy", "checkpoint bytes", "file bytes"), rows))
    return 0


def zoo_info(name: str, flags) -> int:
    """`keras-lowbit zoo info`."""
    del flags
    print(zoo.info(name))
    return 0


def zoo_export(name: str, flags) -> int:
    """`keras-lowbit zoo export`."""
    entry = zoo.info(name)  # a wrong name is told before a missing flag
    out = _tflite_output(flags)
    if entry.scheme == "float":
        raise _is_float(name)
    return _exported(zoo.load(name), name, out, flags)


def _is_float(name):
    return ValueError(f"{name} is a float model: keras-lowbit quantize makes one to export")


def _tflite_output(flags):
    """Where `--out` says, checked before work starts."""
    _required(flags, "out")
    if flags.data and not flags.verify_images:
        raise ValueError(
            "--data is to verify on, and --verify_images=0 leaves that out. Give one of the two"
        )
    return files.checked_output(flags.out, ".tflite", flags.overwrite)


def _exported(model, name, out, flags):
    """Convert, compare every code, and write the file if none is wrong; the exit code."""
    data = files.load_data(flags.data, files.image_shape(model), name) if flags.data else None
    options = {"target": flags.target, **_containers(flags)}
    result = tflite_export.convert(model, **options)
    if flags.verify_images:
        result = result.verified(_verification_images(result, data, flags.verify_images))
    print(result)
    if result.mismatches and flags.weights in report.ROUND_OTHERWISE:
        print(f"{result.mismatches} codes differ: the kernels of {flags.weights} round otherwise")
    elif result.mismatches:
        print(f"error: {result.mismatches} wrong codes; {out} was not written", file=sys.stderr)
        return FAILED
    with files.replacing(out) as temporary:
        temporary.write_bytes(result.content)
    print(out)
    return 0


def _required(flags, *names):
    missing = [f"--{name}" for name in names if not flags[name].value]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given")


def _test_images(dataset, count):
    end = count or len(dataset.x_test)
    return (dataset.x_test if not count else dataset.x_test[:end]), dataset.y_test[:end]


def _opened(path):
    """A `.tflite` ready to run, the shape of its images, and what its input takes."""
    content = files.read_tflite(path)
    try:
        session = runtime.Session(content)
        return session, measure.file_shape(session), Intake.of_file(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _verification_images(result, data, count):
    """Training images, or noise over the whole range of the input's codes."""
    graph = result.graph
    if len(graph.inputs) != 1:
        return {name: _noise(graph, name, count) for name in graph.inputs}
    if data is None:
        return _noise(graph, graph.inputs[0], count)
    return Intake.of_graph(graph).fitted(np.asarray(data.x_train[:count]))


def _noise(graph, name, count):
    random = np.random.default_rng(0)
    tensor = graph.tensors[name]
    shape = (count, *tensor.shape[1:])
    if tensor.dtype == "float32":
        reader = next(op for op in graph if name in op.inputs)
        tensor = graph.tensors[reader.output]
    bounds = np.iinfo(tensor.dtype)
    codes = random.integers(bounds.min, bounds.max + 1, shape)
    if graph.tensors[name].dtype == "float32":
        return ((codes - tensor.zero_point) * tensor.scale).astype("float32")
    return codes.astype(tensor.dtype)
