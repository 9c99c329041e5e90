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
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.layers import packed_kernels
from keras_lowbit.quantizers.sites import layers_of
from keras_lowbit.weights_file import Unknown, fill
from keras_lowbit.whole_files import replacing

PACKAGE = "keras_lowbit"
FORMAT = 1
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
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
        ValueError: names the file: missing, truncated, damaged, or not of `save_packed`.
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

    Raises:
        ValueError: names the file: missing, truncated, damaged, or not of `save_packed`.
    """
    return _checked(path)[0]


def _checked(path):
    """Manifest and members; see `check_packed`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(_METADATA)).get(PACKAGE)
            members = {name: archive.read(name) for name in (manifest or {}).get("sha256", ())}
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut: {error}. Get the file again") from error
    if not manifest or _WEIGHTS not in members:
        raise ValueError(
            f"{path} was not written by keras_lowbit.save_packed. Use keras.models.load_model"
        )
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}; this version reads up to {FORMAT}. "
            "Upgrade keras-lowbit"
        )
    for name, content in members.items():
        if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{path} is damaged: SHA-256 of {name} differs. Get the file again")
    return manifest, members


def _rewrite(source, target, kept):
    """The archive `source` again as `target`: deflated, without what a release does not need."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = {**json.loads(members[_CONFIG]), "compile_config": None}
    members[_CONFIG] = json.dumps(_initialized_once(config)).encode()
    members[_WEIGHTS] = _without_optimizer(members[_WEIGHTS])
    hashes = {n: hashlib.sha256(members[n]).hexdigest() for n in (_CONFIG, _WEIGHTS)}
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
