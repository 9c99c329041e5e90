"""Release a trained run: packed checkpoint, metrics, card, probe tensors, index and table.

    python zoo/release.py RUN_FOLDER [--name NAME] [--origin TEXT]
    python zoo/release.py --again                  cards and table of all models, written anew

RUN_FOLDER is one of `keras-lowbit train`. The checkpoint goes to `keras_lowbit/zoo/released/`, the
evidence to `zoo/NAME/`. A run is refused whose packed checkpoint does not give the very files that
were measured. Both time the files, so run them where nothing else runs, on TensorFlow: the scale of
a binary kernel is a mean, whose last bit may be another on JAX.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
from pathlib import Path

import keras
import numpy as np
from cards import card, overview

import keras_lowbit as klb
import tflite_export
from keras_lowbit.cli.files import replacing, write_text
from keras_lowbit.cli.recipe import without_folders
from keras_lowbit.zoo import files, registry
from tflite_export import runtime

EVIDENCE = Path(__file__).resolve().parent
PROBES = 4
RUNS = 50  # timed inferences of a file
SHIPPED_LIMIT = 40 * 2**20  # bytes of all checkpoints together, in the wheel


def probe_images(shape, seed=0) -> np.ndarray:
    """Images `(4, *shape)` of smooth random colours and noise, uint8, from a seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (PROBES, 4, 4, shape[-1]))
    rows = np.arange(shape[0]) * 4 // shape[0]
    columns = np.arange(shape[1]) * 4 // shape[1]
    smooth = coarse[:, rows][:, :, columns]
    noise = random.integers(-20, 21, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def export(model, recipe, weights):
    """The file as the run made it."""
    settings = recipe["export"]
    return tflite_export.convert(
        model,
        target=settings["target"],
        weights=weights,
        input_type=settings["input_type"] or None,
        output_type=settings["output_type"],
    )


def release(folder: Path, name: str, origin: str) -> registry.Entry:
    """Everything that a release consists of, from a run's folder.

    Raises:
        ValueError: the run was not measured on test images, has a file that was not verified or has
            wrong codes, its packed form gives other files, or all checkpoints together would pass
            the limit of the wheel. Nothing is released then.
        OSError: no run there, or the disk is full or refuses; names the file.
    """
    metrics = without_folders(json.loads((folder / "metrics.json").read_text()))
    if metrics["judged_on"] != "test images":
        raise ValueError(f"{folder} was measured on {metrics['judged_on']}: train without --tune")
    unverified = [kind for kind, file in metrics["files"].items() if file["wrong_codes"] is None]
    if unverified:
        raise ValueError(
            f"{folder}: not verified: {', '.join(unverified)}. Train with [export] verify_images "
            "above 0"
        )
    wrong = sum(file["wrong_codes"] for file in metrics["files"].values())
    if wrong:
        raise ValueError(f"{folder}: {wrong} wrong codes; such a model is not released")
    model = keras.models.load_model(folder / "model.keras", compile=False)
    checkpoint = folder / "released.keras"
    scheme = scheme_of(metrics)
    if scheme == registry.FLOAT:
        model.save(checkpoint)  # uncompiled, so without the optimizer
    else:
        klb.save_packed(model, checkpoint)
    content = checkpoint.read_bytes()
    packed = files.read(checkpoint, scheme)
    entry = entry_of(name, metrics, packed, content, origin)
    known = shelf_with(entry)
    made = files_of(packed, metrics)
    images = probe_images(packed.input_shape[1:])
    outputs = {weights: outputs_of(file, images) for weights, file in made.items()}
    if scheme == registry.FLOAT:
        outputs["float"] = packed.predict(images, verbose=0).tolist()
    probes = {"seed": 0, "shape": images.shape[1:], "outputs": outputs}
    metrics["latency"] = latency_of(made)
    registry.RELEASED.mkdir(exist_ok=True)
    with replacing(registry.RELEASED / f"{name}.keras") as temporary:
        temporary.write_bytes(content)
    evidence = EVIDENCE / name
    evidence.mkdir(exist_ok=True)
    write_text(json.dumps(probes) + "\n", evidence / "probes.json")
    write(entry, metrics)
    index(known)
    return entry


def scheme_of(metrics) -> str:
    """The scheme of a run's model."""
    return metrics["recipe"]["quantize"]["scheme"] or registry.FLOAT


def again(entry: registry.Entry) -> None:
    """Metrics and card of a released model, its files made from the checkpoint and timed anew.

    Raises:
        ValueError: the checkpoint gives other files than were measured.
        OSError: the disk is full or refuses; names the file.
    """
    metrics = json.loads((EVIDENCE / entry.name / "metrics.json").read_text())
    packed = files.read(registry.RELEASED / f"{entry.name}.keras", entry.scheme)
    metrics["latency"] = latency_of(files_of(packed, metrics))
    write(entry, metrics)


def write(entry: registry.Entry, metrics) -> None:
    """Metrics and card.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    evidence = EVIDENCE / entry.name
    write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", evidence / "metrics.json")
    write_text(card(entry, metrics), evidence / "README.md")


def files_of(model, metrics) -> dict[str, bytes]:
    """The files that were measured, made from a packed model.

    Raises:
        ValueError: one of them differs.
    """
    made = {}
    for weights in metrics["recipe"]["export"]["weights"]:
        content = export(model, metrics["recipe"], weights).content
        measured = metrics["files"][f"model_{weights}.tflite"]
        if hashlib.sha256(content).hexdigest() != measured["sha256"]:
            raise ValueError(f"{model.name}: the packed model gives another {weights} file")
        made[weights] = content
    return made


def latency_of(made: dict[str, bytes]) -> dict:
    """Median milliseconds of each file on one thread."""
    ms = {kind: runtime.median_latency(content, runs=RUNS) for kind, content in made.items()}
    return {"ms": ms, "runs": RUNS, "machine": platform.machine()}


def outputs_of(content: bytes, images) -> list[list[float]]:
    """Outputs of a file for the probe images, one list an image."""
    session = runtime.Session(content)
    ((name, dtype),) = session.inputs.items()
    outputs = session.run({name: images.astype(dtype)})
    return next(iter(outputs.values())).reshape(len(images), -1).tolist()


def entry_of(name, metrics, model, content, origin):
    """The index entry."""
    recipe, accuracy = metrics["recipe"], metrics["accuracy"]
    first = next(iter(recipe["export"]["weights"]), "float")
    return registry.Entry(
        name=name,
        architecture=recipe["model"]["architecture"],
        data=recipe["data"]["name"].removesuffix(".npz"),
        scheme=scheme_of(metrics),
        input_shape=tuple(model.input_shape[1:]),
        classes=int(math.prod(model.output_shape[1:])),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        accuracy={kind: scored["accuracy"] for kind, scored in accuracy.items()},
        interval=tuple(accuracy[first]["interval"]),
        file_bytes={
            kind: metrics["files"][f"model_{kind}.tflite"]["bytes"]
            for kind in recipe["export"]["weights"]
        },
        origin=origin,
    )


def shelf_with(entry: registry.Entry) -> dict[str, registry.Entry]:
    """All released models and this one, by name.

    Raises:
        ValueError: all checkpoints together would pass the limit of the wheel.
    """
    known = {**registry.entries(), entry.name: entry}
    total = sum(e.bytes for e in known.values())
    if total > SHIPPED_LIMIT:
        raise ValueError(f"All checkpoints together take {total:,} bytes, over {SHIPPED_LIMIT:,}")
    return known


def index(known: dict[str, registry.Entry]) -> None:
    """The shipped index, and the table of all models.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    write_text(registry.as_json(known), registry.INDEX)
    write_text(overview(known), EVIDENCE / "README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--again", action="store_true", help="cards and table of all models")
    parser.add_argument("--name", default="")
    parser.add_argument("--origin", default="trained here from random weights, Apache-2.0")
    arguments = parser.parse_args()
    if arguments.again == (arguments.folder is not None):
        parser.error("give a run's folder, or --again")
    if arguments.again:
        for entry in registry.entries().values():
            again(entry)
        write_text(overview(registry.entries()), EVIDENCE / "README.md")
        return
    metrics = json.loads((arguments.folder / "metrics.json").read_text())
    name = arguments.name or metrics["recipe"]["name"]
    print(release(arguments.folder, name, arguments.origin))


if __name__ == "__main__":
    main()
