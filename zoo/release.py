"""Release a trained run: packed checkpoint, metrics, card, probe tensors, index and table.

    python zoo/release.py RUN_FOLDER [--name NAME] [--origin TEXT]

RUN_FOLDER is one of `keras-lowbit train`. The checkpoint goes to `keras_lowbit/zoo/released/`, the
evidence to `zoo/NAME/`. A run is refused whose packed checkpoint does not give the very files that
were measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
import tflite_export
from keras_lowbit.packed import load_packed
from keras_lowbit.progress import table
from keras_lowbit.zoo import registry
from tflite_export import runtime

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "zoo"
PROBES = 4
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
        ValueError: the run has wrong codes, or its packed form gives other files.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    if metrics["judged_on"] != "test images":
        raise ValueError(f"{folder} was measured on {metrics['judged_on']}: train without --tune")
    wrong = sum(file["wrong_codes"] for file in metrics["files"].values())
    if wrong:
        raise ValueError(f"{folder}: {wrong} wrong codes; such a model is not released")
    model = keras.models.load_model(folder / "model.keras", compile=False)
    registry.RELEASED.mkdir(exist_ok=True)
    checkpoint = folder / "released.keras"
    klb.save_packed(model, checkpoint)
    content = checkpoint.read_bytes()
    packed = load_packed(checkpoint, compile=False)
    shape = tuple(packed.input_shape[1:])
    images = probe_images(shape)
    probes = {"seed": 0, "shape": list(shape), "outputs": {}}
    recipe = metrics["recipe"]
    for weights in recipe["export"]["weights"]:
        result = export(packed, recipe, weights)
        measured = metrics["files"][f"model_{weights}.tflite"]
        if hashlib.sha256(result.content).hexdigest() != measured["sha256"]:
            raise ValueError(f"{folder}: the packed model gives another {weights} file")
        probes["outputs"][weights] = outputs_of(result.content, images)
    for section, key in (("data", "name"), ("model", "weights")):
        recipe[section][key] = Path(recipe[section][key]).name
    (registry.RELEASED / f"{name}.keras").write_bytes(content)
    evidence = EVIDENCE / name
    evidence.mkdir(exist_ok=True)
    (evidence / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    (evidence / "probes.json").write_text(json.dumps(probes) + "\n")
    entry = entry_of(name, metrics, packed, content, origin)
    (evidence / "README.md").write_text(card(entry, metrics))
    index(entry)
    return entry


def outputs_of(content: bytes, images) -> list[list[float]]:
    """Outputs of a file for the probe images, one list an image."""
    session = runtime.Session(content)
    ((name, dtype),) = session.inputs.items()
    outputs = session.run({name: images.astype(dtype)})
    return next(iter(outputs.values())).reshape(len(images), -1).tolist()


def entry_of(name, metrics, model, content, origin):
    """The index entry."""
    recipe, accuracy = metrics["recipe"], metrics["accuracy"]
    first = recipe["export"]["weights"][0]
    return registry.Entry(
        name=name,
        architecture=recipe["model"]["architecture"],
        data=recipe["data"]["name"].removesuffix(".npz"),
        scheme=recipe["quantize"]["scheme"],
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


def index(entry: registry.Entry) -> None:
    """Add an entry to the shipped index, and write the table of all models.

    Raises:
        ValueError: all checkpoints together would pass the limit of the wheel.
    """
    known = {**registry.entries(), entry.name: entry}
    total = sum(e.bytes for e in known.values())
    if total > SHIPPED_LIMIT:
        raise ValueError(f"All checkpoints together take {total:,} bytes, over {SHIPPED_LIMIT:,}")
    registry.INDEX.write_text(registry.as_json(known))
    (EVIDENCE / "README.md").write_text(overview(known))


def overview(known) -> str:
    """`zoo/README.md`."""
    columns = (
        "model",
        "bits",
        "images",
        "float",
        "file (95 %)",
        "packed",
        "int8 file",
        "int4 file",
    )
    rows = []
    for entry in sorted(known.values(), key=lambda entry: entry.name):
        kinds = list(entry.file_bytes)
        low, high = entry.interval
        rows.append(
            (
                f"[{entry.name}]({entry.name}/README.md)",
                entry.scheme,
                entry.data,
                f"{entry.accuracy['float']:.2%}",
                f"{entry.accuracy[kinds[0]]:.2%} ({low:.1%}-{high:.1%})",
                f"{entry.bytes:,}",
                f"{entry.file_bytes.get('int8', 0):,}",
                f"{entry.file_bytes.get('int4', 0):,}",
            )
        )
    recipes = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    waiting = [name for name in recipes if name not in known and not name.startswith("digits")]
    parts = [
        "# zoo/\n",
        "Evidence of released models, one folder each: card, metrics, probe tensors. This page is",
        "written by `python zoo/release.py RUN_FOLDER`; nothing here is imported, the code is in",
        "`keras_lowbit/zoo/`, and the checkpoints ship in `keras_lowbit/zoo/released/`.\n",
        "Accuracy is that of the exported file on the test images of the data named; each card",
        "says what they are. `imagenet_calibration` are training images of ImageNet: accuracy on",
        "them says only how near a file comes to the float model.\n",
        table("", columns, rows).strip(),
        "",
    ]
    if waiting:
        parts += ["Recipes in `configs/` that are not trained yet:\n"]
        parts += [f"* `{name}`" for name in waiting]
    return "\n".join(parts) + "\n"


def card(entry: registry.Entry, metrics) -> str:
    """A model card."""
    recipe, accuracy = metrics["recipe"], metrics["accuracy"]
    rows = [
        (kind, f"{s['accuracy']:.2%}", _interval(s), _share(s.get("float_agreement")))
        for kind, s in accuracy.items()
    ]
    files = [
        (kind, f"{size:,}", _wrong(metrics["files"][f"model_{kind}.tflite"]))
        for kind, size in entry.file_bytes.items()
    ]
    versions = ", ".join(f"{name} {v}" for name, v in metrics["versions"].items())
    shape = "x".join(map(str, entry.input_shape))
    images = next(iter(accuracy.values()))["images"]
    return "\n".join(
        [
            f"# {entry.name}\n",
            f"`keras_lowbit.zoo.load({entry.name!r})`\n",
            f"* Architecture: `{entry.architecture}`, {shape} pixels 0..255 (normalized inside), "
            f"{entry.classes} classes.",
            f"* Bits: {entry.scheme}, first and last layer at {recipe['quantize']['ends_bits']}.",
            f"* Data: {metrics['data']}. {recipe['data']['holdout']} training images were set "
            f"aside for choices. {recipe['data'].get('about', '')}".rstrip(),
            f"* Recipe: `configs/{recipe['name']}.toml`: {how(recipe)}; "
            f"{metrics['train_seconds']:.0f} s on {metrics['backend']}.",
            f"* Starting weights: {entry.origin}.",
            f"* Versions: {versions}.\n",
            f"## Accuracy on {images:,} {metrics['judged_on']}\n",
            table("", ("model", "accuracy", "95 % interval", "same as float"), rows).strip(),
            "",
            "## Files\n",
            f"Packed checkpoint: {entry.bytes:,} bytes.\n",
            table("", ("file", "bytes", "wrong codes"), files).strip(),
            "",
            "## Limits\n",
            "Trained for the data above; images of another kind get an answer all the same, and "
            "the softmax of the logits is not a calibrated probability.",
            "",
        ]
    )


def how(recipe) -> str:
    """What a recipe does, in a line."""
    train, blocks = recipe["train"], recipe.get("reconstruct", {"steps": 0})
    parts = []
    if blocks["steps"]:
        parts.append(
            f"block reconstruction without labels, {blocks['steps']} steps of "
            f"{blocks['batch_size']} images a block"
        )
    if train["epochs"]:
        parts.append(
            f"{train['epochs']} epochs, batch {train['batch_size']}, rate "
            f"{train['learning_rate']}, distillation {train['distill']}, seed {train['seed']}"
        )
    return "; ".join(parts) or "post-training, calibration alone"


def _share(agreement):
    return "" if agreement is None else f"{agreement:.2%}"


def _interval(scored):
    low, high = scored["interval"]
    return f"{low:.2%}-{high:.2%}"


def _wrong(file):
    return f"{file['wrong_codes']} of {file['compared_codes']:,}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--origin", default="trained here from random weights, Apache-2.0")
    arguments = parser.parse_args()
    metrics = json.loads((arguments.folder / "metrics.json").read_text())
    name = arguments.name or metrics["recipe"]["name"]
    print(release(arguments.folder, name, arguments.origin))


if __name__ == "__main__":
    main()
