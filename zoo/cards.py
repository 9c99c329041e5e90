"""What people read of released models: the table of all, and a card for each."""

from __future__ import annotations

from pathlib import Path

from keras_lowbit.cli.recipe import refines_codes
from keras_lowbit.progress import table
from keras_lowbit.zoo import registry

ROOT = Path(__file__).resolve().parents[1]


def overview(known) -> str:
    """`zoo/README.md`."""
    columns = (
        "model",
        "bits",
        "images",
        "float",
        "file (95 %)",
        "checkpoint",
        "int8 file",
        "int4 file",
    )
    rows = []
    for entry in sorted(known.values(), key=lambda entry: entry.name):
        rows.append(
            (
                f"[{entry.name}]({entry.name}/README.md)",
                entry.scheme,
                entry.data,
                f"{entry.accuracy['float']:.2%}",
                _of_first_file(entry),
                f"{entry.bytes:,}",
                _bytes(entry, "int8"),
                _bytes(entry, "int4"),
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
    latency = metrics["latency"]
    files = [
        (
            kind,
            f"{size:,}",
            f"{latency['ms'][kind]:.3g}",
            _wrong(metrics["files"][f"model_{kind}.tflite"]),
        )
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
            f"* Bits: {_bits(entry, recipe)}.",
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
            f"{'Packed checkpoint' if files else 'Checkpoint'}: {entry.bytes:,} bytes.\n",
            *_timed(files, latency),
            "## Limits\n",
            "Trained for the data above; images of another kind get an answer all the same, and "
            "the softmax of the logits is not a calibrated probability.",
            "",
        ]
    )


def _bits(entry, recipe):
    if entry.scheme == registry.FLOAT:
        return "float, for low-bit models to start from"
    given = recipe["quantize"]
    others = [f"; `{name}` {scheme}" for name, scheme in given["exceptions"].items()]
    return f"{entry.scheme}, first and last layer at {given['ends_bits']}" + "".join(others)


def _timed(files, latency):
    if not files:  # of a float model
        return []
    return [
        table("", ("file", "bytes", "ms a frame", "wrong codes"), files).strip(),
        "",
        f"Milliseconds are medians of {latency['runs']} runs on one thread of an "
        f"{latency['machine']} machine.",
        "",
    ]


def how(recipe) -> str:
    """What a recipe does, in a line."""
    train, blocks = recipe["train"], recipe.get("reconstruct", {"steps": 0})
    parts = []
    if blocks["steps"]:
        counts = {blocks["steps"], *blocks.get("block_steps", {}).values()}
        steps = " to ".join(map(str, sorted({min(counts), max(counts)})))
        parts.append(
            f"block reconstruction without labels, {steps} steps of "
            f"{blocks['batch_size']} images a block"
            + (", kernels rounded to data" if blocks.get("rounding") == "data" else "")
            + (f", {blocks['views']} random views of each" if blocks.get("views") else "")
            + (", ranges of channels levelled first" if recipe["model"].get("rescale") else "")
        )
    whole = recipe.get("refine", {"steps": 0})
    if whole["steps"]:
        parts.append(
            f"distillation of {'the whole' if refines_codes(whole) else 'all scales and biases'} "
            f"without labels, {whole['steps']} steps of {whole['batch_size']} images"
        )
    before = recipe["pretrain"]
    if before["epochs"]:
        parts.append(f"{_fitted(before)}, as a float model")
    if train["epochs"]:
        taught = f" from {train['teacher']}" if train.get("teacher") else ""
        parts.append(
            f"{_fitted(train)}, distillation {train['distill']}{taught}, seed {train['seed']}"
        )
    return "; ".join(parts) or "post-training, calibration alone"


def _fitted(train):
    return f"{train['epochs']} epochs, batch {train['batch_size']}, rate {train['learning_rate']}"


def _of_first_file(entry):
    if not entry.file_bytes:
        return ""
    low, high = entry.interval
    return f"{entry.accuracy[next(iter(entry.file_bytes))]:.2%} ({low:.1%}-{high:.1%})"


def _bytes(entry, kind):
    size = entry.file_bytes.get(kind)
    return "" if size is None else f"{size:,}"


def _share(agreement):
    return "" if agreement is None else f"{agreement:.2%}"


def _interval(scored):
    low, high = scored["interval"]
    return f"{low:.2%}-{high:.2%}"


def _wrong(file):
    return f"{file['wrong_codes']} of {file['compared_codes']:,}"
