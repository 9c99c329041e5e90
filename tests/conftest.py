"""What every test shares: a fixed seed, fresh layer names, golden texts, quiet logs."""

import contextlib
import importlib.util
import os
import re
from pathlib import Path

# Before any backend is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # full float32 products where there is a GPU
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; each with a thread pool as wide as the machine is slower.
    for _name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(_name, "1")

if os.access(_root := Path(__file__).parents[1], os.W_OK):
    # Most of JAX's time in tests is compiling; what tests and runs share is compiled once. A folder
    # for each worker: entries are written in place, and another could read half of one.
    _cache = _root / ".jax_cache" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    # Workers inherit the folder of the process that began them.
    if Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", _cache)).parent == _cache.parent:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import pytest

try:
    import hypothesis
except ImportError:  # only the property tests need it, and they say so themselves
    pass
else:
    hypothesis.settings.register_profile(
        "repeatable", deadline=None, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="write golden texts instead of comparing"
    )


def pytest_collection_modifyitems(config, items):
    if importlib.util.find_spec("ai_edge_litert") is not None:
        return
    skip = pytest.mark.skip(reason="needs ai-edge-litert: pip install keras-lowbit[tflite]")
    for item in items:
        if "runtime" in item.keywords:
            item.add_marker(skip)


def pytest_report_header():
    import keras

    return f"keras {keras.__version__} on {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Each test starts with the same seed and with layer names that count from zero."""
    import keras

    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def backend():
    """Name of the Keras backend that the tests run on."""
    import keras

    return keras.backend.backend()


@pytest.fixture
def golden(request):
    """Compare a text with `golden/<name>.txt` beside the test: `golden("name", text)`.

    `pytest --update-golden` writes the file; look at the difference before you commit it.
    """
    folder = Path(request.path).parent / "golden"
    update = request.config.getoption("--update-golden")

    def compare(name, text):
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"golden: a name of letters, digits, '_', '.', '-'. Got {name!r}")
        file = folder / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            folder.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        if not file.exists():
            pytest.fail(f"{file} is missing: run pytest --update-golden and read what it wrote")
        assert text == file.read_text(encoding="utf-8"), (
            f"{file} differs; if that is meant, run pytest --update-golden"
        )

    return compare


@pytest.fixture
def contents():
    """`contents(folder)`: bytes of every file below, to see that nothing changed."""
    return lambda folder: {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def small_disk():
    """`with small_disk(n)`: no file may grow beyond `n` bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limited


@pytest.fixture
def homeless(monkeypatch):
    """A process whose user has no home folder, as in many containers."""
    pwd = pytest.importorskip("pwd")

    def nobody(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
