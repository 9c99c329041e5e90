"""The release form of a quantized model: a `.keras` file with packed codes for kernels.

It is a plain Keras archive. Members are deflated; `model.weights.h5` holds packed codes
(`layers.packed_kernels`) and no optimizer state; `config.json` has no compile settings, and its
initializers run only for layers made anew, not on loading; `metadata.json` carries the
manifest, with the SHA-256 of both.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.layers import packed_kernels
from keras_lowbit.quantizers.sites import layers_of
from keras_lowbit.weights_file import Unknown, fill
from keras_lowbit.whole_files import DAMAGE, first_line, replacing

PACKAGE = "keras_lowbit"
FORMAT = 1
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_HASHED = (_CONFIG, _WEIGHTS)
# A flipped bit makes `zipfile` ask for a password, which is a RuntimeError.
_DAMAGE = (*DAMAGE, RuntimeError)
# Objects that several layers share stand in a config under a number, which Keras alone resolves.
_SHARED = b"shared_object_id"


@dataclass(frozen=True)
class Packed:
    """What `save_packed` wrote.

    Args:
        path: the file.
        size: its bytes.
        kept_float: layer name to the reason why a kernel of it stays float32.
    """

    path: Path
    size: int
    kept_float: dict[str, str] = field(default_factory=dict)


def save_packed(model: keras.Model, path) -> Packed:
    """Write the release form of a model: kernels as packed codes and scales.

    `keras.models.load_model(path)` reads it after `import keras_lowbit`, in safe mode, as a
    trainable, uncompiled model whose latent kernels are `code * scale` and whose integer outputs
    are those of `model`. Optimizer state and latents are gone: `model.save` is the form to resume
    training from. The file takes at most 1.1 times the packed codes and the remaining float32,
    plus 64 KB.

    Args:
        model: a built model of quantized layers.
        path: where to write, ending in `.keras`. A file there is replaced when the new one is
            complete, and stays as it is when anything goes wrong.

    Returns:
        The file's size, and the kernels that stay float32 with the reason.

    Raises:
        ValueError: another ending, no such folder, or a model without low-bit kernels.
        OSError: the disk is full or refuses; names the file.
    """
    walk.check_model(model)
    path = Path(path)
    if path.suffix != ".keras":
        raise ValueError(f"save_packed writes .keras files. Got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}. Make it first")
    if not any(packed_kernels.kernels(layer) for _, layer in layers_of(model)):
        raise ValueError(
            f"{model.name} has no quantized layer, so there are no codes to pack. Use "
            "keras_lowbit.quantize_model first, or model.save for a float model"
        )
    with (
        replacing(path) as packed,
        # Beside the target, where there is room for a file of its size.
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder,
    ):
        full = Path(folder, "full.keras")
        with packed_kernels.writing() as kept:
            keras.saving.save_model(model, full)
        _rewrite(full, packed, kept)
    return Packed(path, path.stat().st_size, kept)


def load_packed(path, **kwargs) -> keras.Model:
    """Check a file of `save_packed` against its manifest, then load it.

    Args:
        path: the file.
        **kwargs: those of `keras.models.load_model`.

    Raises:
        ValueError: as `check_packed`.
    """
    _, members = _checked(path)
    if set(kwargs) <= {"compile"}:  # the file holds nothing to compile with
        model = _loaded(members)
        if model is not None:
            return model
    return keras.models.load_model(path, **kwargs)


def _loaded(members):
    """The model, or `None` where only Keras' own, slower reader gets it right."""
    if _SHARED in members[_CONFIG]:
        return None
    with _collector_at_rest():
        model = keras.saving.deserialize_keras_object(json.loads(members[_CONFIG]))
        try:
            fill(model, members[_WEIGHTS])
        except Unknown:
            return None
    return model


@contextlib.contextmanager
def _collector_at_rest():
    """No garbage collection inside.

    All that is made there stays, and a backend's modules are many objects to look through again
    and again, up to a fifth of the time to load.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_packed(path) -> dict:
    """The manifest of a file of `save_packed`, after comparing the SHA-256 of what it lists.

    It lists `config.json` and `model.weights.h5`, no more and no less.

    Raises:
        ValueError: names the file: missing, truncated, damaged (its manifest too), of a newer
            format, or not of `save_packed`.
    """
    return _checked(path)[0]


def _checked(path):
    """Manifest and members; see `check_packed`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    manifest = _manifest(path)
    members = _members(path, _HASHED)
    for name, content in members.items():
        if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{path} is damaged: SHA-256 of {name} differs. Get the file again")
    return manifest, members


def _members(path, names):
    """Contents of members of an archive by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in names}
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged or cut: {first_line(error)}. Get the file again"
        ) from error


def _manifest(path):
    """The manifest of a file, of the types and with the hashes that `_rewrite` gives it."""
    content = _members(path, [_METADATA])[_METADATA]
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise _damaged(path, f"{_METADATA} is no JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise _damaged(path, f"{_METADATA} holds {type(metadata).__name__}, no object")
    if PACKAGE not in metadata:
        raise ValueError(
            f"{path} was not written by keras_lowbit.save_packed. Use keras.models.load_model"
        )
    manifest = metadata[PACKAGE]
    if not isinstance(manifest, dict):
        raise _damaged(path, f"its manifest is {type(manifest).__name__}, no object")
    number = manifest.get("format")
    if type(number) is not int or number < 1:  # True is an int
        raise _damaged(path, f"its manifest has format {number!r}, no whole number above 0")
    if number > FORMAT:  # before the rest, which it may have changed
        raise ValueError(
            f"{path} has format {number}; this version reads up to {FORMAT}. Upgrade keras-lowbit"
        )
    hashes, kept = manifest.get("sha256"), manifest.get("kept_float")
    listed = sorted(hashes) if isinstance(hashes, dict) else []
    if listed != sorted(_HASHED):
        listed, wanted = ", ".join(listed) or "nothing", " and ".join(_HASHED)
        raise _damaged(path, f"its manifest lists SHA-256 of {listed}, not of {wanted}")
    if not isinstance(kept, dict):
        raise _damaged(path, f"its manifest has kept_float {kept!r}, no object")
    return manifest


def _damaged(path, what):
    return ValueError(f"{path} is damaged: {what}. Get the file again, or save_packed it again")


def _rewrite(source, target, kept):
    """The archive `source` again as `target`: deflated, without what a release does not need."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = {**json.loads(members[_CONFIG]), "compile_config": None}
    members[_CONFIG] = json.dumps(_initialized_once(config)).encode()
    members[_WEIGHTS] = _without_optimizer(members[_WEIGHTS])
    hashes = {n: hashlib.sha256(members[n]).hexdigest() for n in _HASHED}
    # Not a member of its own: a fourth member makes Keras unpack the archive to disk.
    metadata = json.loads(members[_METADATA])
    metadata[PACKAGE] = {"format": FORMAT, "sha256": hashes, "kept_float": kept}
    members[_METADATA] = json.dumps(metadata).encode()
    with open(target, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        file.flush()
        os.fsync(file.fileno())


def _without_optimizer(content: bytes) -> bytes:
    import h5py  # comes with Keras

    buffer = io.BytesIO()
    with h5py.File(io.BytesIO(content)) as old, h5py.File(buffer, "w") as new:
        for name in old:
            if name != "optimizer":
                old.copy(name, new)
    return buffer.getvalue()


def _initialized_once(config):
    """The config with initializers in `SkipOnce`."""
    if isinstance(config, list):
        return [_initialized_once(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("registered_name") == f"{PACKAGE}>{SkipOnce.__name__}":
        return {**config, "config": {**config["config"], "skip": True}}
    if config.get("module") == "keras.initializers":
        return keras.saving.serialize_keras_object(SkipOnce(config))
    return {key: _initialized_once(value) for key, value in config.items()}


@keras.saving.register_keras_serializable(package=PACKAGE)
class SkipOnce(keras.initializers.Initializer):
    """Zeros at the first call, `original` from then on.

    Values that a checkpoint overwrites need no random numbers and no compiled operations (on JAX
    they take seconds), while a copy of the loaded layer starts as the original would.

    Args:
        original: a Keras initializer, its name or its config.
        skip: whether the next call gives zeros.
    """

    def __init__(self, original, skip=True):
        self.original = original
        self.skip = skip

    def __call__(self, shape, dtype=None, **kwargs):
        """Zeros of `shape`, or what `original` gives."""
        if self.skip:
            self.skip = False
            # From NumPy: on JAX, ops.zeros compiles something for every new shape.
            return ops.convert_to_tensor(np.zeros(shape, np.float32), dtype=dtype)
        return keras.initializers.get(self.original)(shape, dtype, **kwargs)

    def get_config(self):
        """Arguments of the constructor."""
        original = self.original
        if isinstance(original, keras.initializers.Initializer):
            original = keras.saving.serialize_keras_object(original)
        return {"original": original, "skip": self.skip}
