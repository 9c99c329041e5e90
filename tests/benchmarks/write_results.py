"""Write `docs/results.md` and the tables of `README.md` and `docs/exactness.md`, from logs.

    PYTHONPATH=. python tests/benchmarks/write_results.py [RUN_FOLDER ...]

Each run folder is one of `keras-lowbit train`; its `metrics.json` is kept in `docs/results/`
(file names only, no paths). The page is then written from everything that lies there, and the two
tables, between marks, from `zoo/*/metrics.json`; no figure in them is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from keras_lowbit.cli.recipe import without_folders
from keras_lowbit.progress import table
from keras_lowbit.zoo import registry
from tests.benchmarks import cost_parts, mobile_parts, study_part

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results"
ZOO = ROOT / "zoo"
# Around what is written into a page that people write.
BEGIN = "<!-- begin: written by tests/benchmarks/write_results.py -->"
END = "<!-- end -->"
# Models of the README's table: two nets, and what fewer bits cost each.
HEADLINE = (
    "resnet8_cifar10_w4a4",
    "resnet20_cifar10_w4a4",
    "resnet20_cifar10_w2a2",
    "resnet20_cifar10_w1a1",
    "mobilenet_v2_cifar100_w4a4",
    "mobilenet_v2_cifar100_w2a2",
)
KINDS = ("int8", "int4")
# Share of images below which docs/exactness.md names a model.
SELDOM = 0.995
# What each figure has to reach, in percent, and where the bar comes from.
BARS = {
    "resnet8_cifar10_w8a8": (87.0, "MLPerf Tiny's own int8 file: 86.97"),
    "resnet8_cifar10_w4a8": (86.7, "at most 5 epochs"),
    "resnet8_cifar10_w4a4": (87.0, "zoo; at most 20 epochs: 86.6"),
    "resnet8_cifar10_w2a2": (83.5, "zoo"),
    "resnet20_cifar10_w8a8": (91.58, "float - 0.15"),
    "resnet20_cifar10_w4a4": (91.5, "at most 20 epochs"),
    "resnet20_cifar10_w3a3": (90.7, "at most 20 epochs"),
    "resnet20_cifar10_w2a2": (88.5, "at most 20 epochs"),
    "resnet20_cifar10_wta8": (90.3, "at most 20 epochs"),
    "resnet20_cifar10_w1a1": (72.0, "at most 20 epochs"),
    "resnet20_cifar100": (68.0, "zoo"),
    "resnet20_cifar100_w4a4": (67.5, "zoo"),
    "resnet20_cifar100_w2a2": (64.5, "zoo"),
    "mobilenet_v2_cifar100": (74.0, "zoo"),
    "mobilenet_v2_cifar100_w4a4": (73.0, "zoo"),
    "mobilenet_v2_cifar100_w2a2": (68.0, "zoo"),
}
ABOUT = (
    "*bar*: a goal set before the measurement. For nets and bits that tables of papers have it",
    "follows the published figures; what else it goes by is said in brackets. A *NO* is a goal",
    "that was missed; it stays in the table. Rows without a bar had no goal.\n",
    "*zoo*: a goal for the released model. *at most N epochs*: a goal for a training that short.\n",
    "*convert* is timed twice. Under MobileNetV2 it is one conversion in a process that has",
    "calibrated the model just before, with all modules loaded; under Conversion it is the first",
    "one of a fresh process.\n",
)


def keep(folder: Path) -> None:
    """Copy a run's metrics, without the paths of the machine it ran on."""
    metrics = without_folders(json.loads((folder / "metrics.json").read_text()))
    recipe = metrics["recipe"]
    imagenet = recipe["data"]["name"].startswith("imagenet")
    target = (KEPT / "imagenet" if imagenet else KEPT) / f"{recipe['name']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")


def recipe_rows(data):
    """A row for each file of the runs on some data that are kept, or for a float model."""
    for path in sorted([*KEPT.glob(f"*_{data}.json"), *KEPT.glob(f"*_{data}_*.json")]):
        metrics = json.loads(path.read_text())
        accuracy, files = metrics["accuracy"], metrics["files"]
        # Those of the float model in front, where the run trained it too.
        epochs = sum(metrics["recipe"][part]["epochs"] for part in ("pretrain", "train"))
        name = metrics["recipe"]["name"]
        if not files:
            found = mobile_parts.percent(accuracy["float"])
            yield (name, "", epochs, found, "", "", "", "", "", *_verdict(name, accuracy["float"]))
        for weights in metrics["recipe"]["export"]["weights"]:
            file = files[f"model_{weights}.tflite"]
            yield (
                name,
                weights,
                epochs,
                f"{accuracy['float']['accuracy']:.2%}",
                f"{accuracy['quantized']['accuracy']:.2%}",
                mobile_parts.percent(accuracy[weights]),
                f"{accuracy[weights]['agreement']:.2%}",
                f"{file['bytes']:,}",
                f"{file['wrong_codes']} of {file['compared_codes']:,}",
                *_verdict(name, accuracy[weights]),
            )


def _verdict(name, scored):
    """The bar of a recipe and whether it is reached, both empty where it has none."""
    if name not in BARS:
        return "", ""
    bar, why = BARS[name]
    return f"{bar} ({why})", "yes" if 100 * scored["accuracy"] >= bar else "NO"


def earlier_rows():
    """A row for each run that a later recipe took the place of, in `earlier/`."""
    for path in sorted((KEPT / "earlier").glob("*.json")):
        metrics = json.loads(path.read_text())
        train = metrics["recipe"]["train"]
        scored = next(iter(metrics["recipe"]["export"]["weights"]))
        yield (
            metrics["recipe"]["name"],
            train["epochs"],
            train["learning_rate"],
            train["distill"],
            train["temperature"],
            mobile_parts.percent(metrics["accuracy"][scored]),
            metrics["superseded"],
        )


def page() -> str:
    """The whole page."""
    of_files = (
        "recipe",
        "file",
        "epochs",
        "float",
        "quantized",
        "file (95 %)",
        "same answer",
        "bytes",
        "wrong codes",
        "bar",
        "reached",
    )
    parts = [
        "# Results\n",
        "Written by `python tests/benchmarks/write_results.py` from `docs/results/`; accuracies",
        "are those of the exported file on the 10,000 test images, which were looked at once for",
        "each training.\n",
        *ABOUT,
        "## CIFAR-10\n",
        "`keras-lowbit train configs/RECIPE.toml --data cifar10.npz --weights FLOAT --out RUN`\n",
        table("", of_files, list(recipe_rows("cifar10"))).strip(),
        "",
    ]
    earlier = list(earlier_rows())
    if earlier:
        columns = ("recipe", "epochs", "rate", "distillation", "temperature", "file (95 %)")
        columns = (*columns, "what was otherwise")
        parts += [
            "Recipes before the ones above, whose test images were looked at too:\n",
            table("", columns, earlier).strip(),
            "",
        ]
    hundred = list(recipe_rows("cifar100"))
    if hundred:
        parts += [
            "## CIFAR-100\n",
            "Low-bit recipes start at the float model of the zoo, such as",
            "`--weights keras_lowbit/zoo/released/resnet20_cifar100.keras`.\n",
            table("", of_files, hundred).strip(),
            "",
        ]
    parts += mobile_parts.recipes_part(KEPT / "imagenet")
    for name, part in mobile_parts.PARTS.items():
        parts += _from_file(name, part)
    parts += study_part.part(KEPT / "study")
    for name, part in cost_parts.PARTS.items():
        parts += _from_file(name, part)
    return "\n".join(parts) + "\n"


def _from_file(name, part):
    """What is written from `docs/results/<name>.json`; nothing where it was not measured."""
    found = KEPT / f"{name}.json"
    return part(json.loads(found.read_text())) if found.is_file() else []


def zoo_metrics(name):
    """What was measured of a released model."""
    return json.loads((ZOO / name / "metrics.json").read_text())


def headline() -> str:
    """The README's table: released models, their accuracy and bytes."""
    rows = []
    for name in HEADLINE:
        entry, metrics = registry.entries()[name], zoo_metrics(name)
        files = metrics["files"].values()
        wrong, compared = (sum(f[key] for f in files) for key in ("wrong_codes", "compared_codes"))
        rows.append(
            (
                f"`{name}`",
                entry.scheme,
                f"{metrics['accuracy']['float']['accuracy']:.2%}",
                mobile_parts.percent(metrics["accuracy"]["int4"]),
                f"{entry.bytes:,}",
                *(f"{metrics['files'][f'model_{kind}.tflite']['bytes']:,}" for kind in KINDS),
                f"{wrong} of {compared:,}",
            )
        )
    columns = ("model", "bits", "float", "file (95 %)", "checkpoint", "int8 file", "int4 file")
    return table("", (*columns, "wrong codes"), rows).strip()


def agreements() -> str:
    """For `docs/exactness.md`: how often a released Keras model and its file say the same."""
    rows, shares = [], {}
    for name, entry in sorted(registry.entries().items()):
        scored = [zoo_metrics(name)["accuracy"].get(kind) for kind in KINDS]
        scored = [found for found in scored if found is not None]
        if not scored:  # a float model
            continue
        shares[name] = share = min(found["agreement"] for found in scored)
        images = scored[0]["images"]
        rows.append(
            (f"`{name}`", entry.scheme, images, round((1 - share) * images), f"{share:.2%}")
        )
    low, high = min(shares.values()), max(shares.values())
    seldom = [f"`{name}` ({share:.2%})" for name, share in shares.items() if share < SELDOM]
    columns = ("model", "bits", "images", "another class", "same class")
    text = f"{len(rows)} models, from {low:.2%} to {high:.2%} of the images."
    if seldom:
        text += f" Under {SELDOM:.1%}: {', '.join(seldom)}."
    noise = json.loads((KEPT / "float_noise.json").read_text())
    parts = (text, table("", columns, rows).strip(), growth(noise))
    return "\n\n".join((textwrap.fill(parts[0], 100), parts[1], textwrap.fill(parts[2], 100)))


def growth(noise) -> str:
    """How differences begin and grow: of a log of `float_noise.py`, a paragraph."""
    layers = noise["layers"]
    first = next(row for row in layers if row["wrong"])
    worst = max(layers, key=lambda row: row["wrong"] / row["compared"])
    middle = next(r for r in layers if r["wrong"] / r["compared"] > 0.01)
    shown = (f"{r['wrong'] / r['compared']:.1%} behind `{r['layer']}`" for r in (middle, worst))
    return (
        f"Layer by layer (`python tests/benchmarks/float_noise.py {noise['model']}`, "
        f"{noise['images']} images): {first['wrong']} of {first['compared']:,} codes differ behind "
        f"`{first['layer']}`, {', '.join(shown)}."
    )


def put(path: Path, text: str) -> str:
    """The page at `path` with `text` between its marks.

    Raises:
        ValueError: the page does not have each mark once.
    """
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path.name} needs one line {BEGIN} and one line {END}")
    before, rest = content.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


# Pages of people, and what is written into them.
TABLES = {"README.md": headline, "docs/exactness.md": agreements}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help="kept, then shown")
    for folder in parser.parse_args().runs:
        if not (folder / "metrics.json").is_file():
            parser.error(f"{folder} has no metrics.json: is it a folder of keras-lowbit train?")
        keep(folder)
    (ROOT / "docs" / "results.md").write_text(page())
    for name, text in TABLES.items():
        (ROOT / name).write_text(put(ROOT / name, text()))


if __name__ == "__main__":
    main()
