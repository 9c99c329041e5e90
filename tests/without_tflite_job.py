"""Command lines, one after the other, where nothing of the extra `tflite` can be imported."""

import contextlib
import io
import json
import sys
from importlib.machinery import PathFinder

import keras

# TensorFlow itself brings flatbuffers.
GONE = {"ai_edge_litert"} | ({"flatbuffers"} - ({*sys.modules} & {"tensorflow"}))


class WithoutTheExtra(PathFinder):
    """Finds everything but the extra, as in an environment without it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTheExtra

import tflite_export  # noqa: E402
from keras_lowbit_cli.main import main  # noqa: E402


def convert(argv):
    """As a user of Python: whether the model can be exported, then the attempt."""
    model = keras.models.load_model(argv[0])
    print(tflite_export.check(model))
    try:
        tflite_export.convert(model)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def outcomes(lines):
    """Exit code, output and errors of each line."""
    for argv in lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = convert(argv[1:]) if argv[0] == "convert" else main(argv)
        yield code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    found = list(outcomes(json.loads(sys.argv[1])))
    print(json.dumps(found))
