"""Checkpoints of released models: in the package, in a cache, or at a URL; and reading them."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import keras

from keras_lowbit.packed import load_packed
from keras_lowbit.paths import expanded
from keras_lowbit.whole_files import replacing
from keras_lowbit.zoo import registry

URL_VARIABLE = "KERAS_LOWBIT_URL"
CACHE_VARIABLE = "KERAS_LOWBIT_CACHE"


def read(path: Path, scheme: str) -> keras.Model:
    """The uncompiled model of a checkpoint: packed, or of `registry.FLOAT` as Keras wrote it.

    Raises:
        ValueError: names the file: damaged, or not of `save_packed`.
    """
    load = keras.models.load_model if scheme == registry.FLOAT else load_packed
    return load(path, compile=False)


def find(entry: registry.Entry, *, url: str | None = None, cache: str | Path | None = None) -> Path:
    """The checkpoint of a released model, its SHA-256 checked.

    Looks in the package, then in the cache, then at `url`; a download goes to the cache and is
    put in place only when it is complete and right.

    Args:
        entry: of `registry.info`.
        url: base of checkpoints, `<url>/<name>.keras`; default: the environment variable
            `KERAS_LOWBIT_URL`, else none.
        cache: folder of downloads; default: `KERAS_LOWBIT_CACHE`, else `~/.cache/keras_lowbit`.

    Raises:
        ValueError: a file with another SHA-256 (it stays where it is), or a model that is not
            shipped and no URL, or no home folder for the cache.
        OSError: no network, a download that breaks off, or a folder that cannot be written; says
            so.
    """
    name = f"{entry.name}.keras"
    path = registry.RELEASED / name
    if not path.is_file():  # what ships needs no cache, and so no home folder
        path = _folder(cache) / name
    if path.is_file():
        _check(path.read_bytes(), entry, path, "Remove it and load again")
        return path
    base = url or os.environ.get(URL_VARIABLE)
    if not base:
        raise ValueError(
            f"{name} is neither in the package nor in {path.parent}. Put it there, or give the "
            f"base of a URL: zoo.load({entry.name!r}, url=...) or {URL_VARIABLE}"
        )
    source = f"{base.rstrip('/')}/{name}"
    content = _download(source)
    _check(content, entry, source, "Nothing was kept; check the URL")
    return _put(content, path)


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _folder(cache):
    given = cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/keras_lowbit"
    return expanded(given, f"Choose another folder (cache=, or {CACHE_VARIABLE})")


def _check(content, entry, place, advice):
    found = sha256(content)
    if found != entry.sha256:
        raise ValueError(
            f"{place}: SHA-256 is {found[:12]}..., expected {entry.sha256[:12]}...: the file is "
            f"cut, damaged or of another version. {advice}"
        )


def _download(source):
    try:
        with urllib.request.urlopen(source, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(
            f"Could not get {source}: {str(error).strip()}. Without a network, put the file into "
            f"the cache folder (cache=, or {CACHE_VARIABLE})"
        ) from error


def _put(content, path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise OSError(
            error.errno, f"{reason}; choose another folder (cache=, or {CACHE_VARIABLE})", str(path)
        ) from error
    return path
