"""Files for target `builtin` in tflite-runtime 2.14, in its own environment.

Its built-in kernels round twice, so codes may differ: by how much is printed, operation by
operation, each on the inputs that LiteRT computed.
"""

import collections
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from keras_lowbit import zoo
from keras_lowbit.integer import graph as ir
from keras_lowbit.integer import reference
from tests.exactness.coverage import Coverage
from tests.exactness.hostile import exported, hostile, quantized
from tests.exactness.random_models import random_model, random_options
from tflite_export import flatbuffer

PYTHON = Path(__file__).parents[2] / ".venv-old/bin/python"

pytestmark = [
    pytest.mark.once,
    pytest.mark.runtime,
    pytest.mark.skipif(not PYTHON.exists(), reason="run `make test-old-runtime`"),
]

_RUNNER = """
import pickle, sys
import numpy as np
from tflite_runtime.interpreter import Interpreter
results = []
for content, inputs in pickle.load(open(sys.argv[1], "rb")):
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    details = {d["name"]: d for d in interpreter.get_input_details()}
    found = {d["name"]: [] for d in interpreter.get_output_details()}
    batch = next(iter(details.values()))["shape"][0]
    for start in range(0, len(next(iter(inputs.values()))), batch):
        for name, array in inputs.items():
            interpreter.set_tensor(details[name]["index"], array[start : start + batch])
        interpreter.invoke()
        for d in interpreter.get_output_details():
            found[d["name"]].append(interpreter.get_tensor(d["index"]).copy())
    results.append({name: np.concatenate(parts) for name, parts in found.items()})
pickle.dump(results, open(sys.argv[2], "wb"), protocol=4)
"""


def run_old(jobs, folder):
    given, taken = folder / "jobs.pickle", folder / "results.pickle"
    given.write_bytes(pickle.dumps(jobs, protocol=4))
    made = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", _RUNNER, given, taken],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return pickle.loads(taken.read_bytes())


def one_op(graph, op):
    """A graph of a single operation, on the tensors it has in `graph`."""
    names = dict.fromkeys((*op.inputs, op.output))
    tensors = {name: graph.tensors[name] for name in names}
    return ir.Graph(tensors, (op,), tuple(dict.fromkeys(op.inputs)), (op.output,))


def models():
    yield quantized(hostile(zoo.build("resnet8"), 1), "w4a4"), {}
    for seed in range(12):
        scheme, _, options = random_options(seed, Coverage())
        yield quantized(random_model(seed), scheme, seed), options


def test_files_for_builtin_load_and_run_within_few_codes(tmp_path, capsys):
    jobs, expected, kinds, files = [], [], [], 0
    for small, options in models():
        result, images = exported(small, "int8", target="builtin", **options)
        assert result.mismatches == 0
        feeds = dict(zip(result.graph.inputs, images, strict=True))
        jobs.append((result.content, feeds))
        expected.append(reference.run(result.graph, feeds))
        kinds.append("whole file, outputs")
        files += 1
        for op in result.graph:
            part = one_op(result.graph, op)
            jobs.append((flatbuffer.write(part), {n: expected[-1][n] for n in part.inputs}))
            expected.append(expected[-1])
            kinds.append(op.kind)
    rows = collections.defaultdict(lambda: [0, 0, 0.0])
    outputs = run_old(jobs, tmp_path)
    for wanted, kind, found in zip(expected, kinds, outputs, strict=True):
        for name, codes in found.items():
            steps = np.abs(codes.astype(np.float64) - wanted[name].astype(np.float64))
            if codes.dtype == np.float32:
                steps = np.round(steps / max(_step(wanted[name]), 1e-30))
            row = rows[kind]
            row[0] += int(np.count_nonzero(steps))
            row[1] += steps.size
            row[2] = max(row[2], float(steps.max(initial=0)))
    with capsys.disabled():
        print(f"\n{files} files load and run in tflite-runtime 2.14")
        for kind, (wrong, compared, most) in sorted(rows.items()):
            print(f"  {kind:22} {wrong:7,} of {compared:9,} differ, at most {most:g} LSB")
    single = {kind: row for kind, row in rows.items() if kind != "whole file, outputs"}
    exact = (
        "add",
        "pad",
        "reshape",
        "concatenation",
        "max_pool_2d",
        "average_pool_2d",
        "dequantize",
    )
    for kind, (wrong, compared, most) in single.items():
        assert most <= 1, kind
        assert wrong == 0 or kind not in exact, kind
        assert compared


def _step(values):
    """The smallest difference between two reals of a tensor: one code, where neighbours occur."""
    gaps = np.diff(np.unique(values))
    return float(gaps.min()) if gaps.size else 1.0
