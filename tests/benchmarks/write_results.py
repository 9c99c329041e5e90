"""Write `docs/results.md` from measurements.

    python tests/benchmarks/write_results.py [RUN_FOLDER ...]

Each run folder is one of `keras-lowbit train`; its `metrics.json` is kept in `docs/results/`
(file names only, no paths). The page is then written from everything that lies there; no figure in
it is typed by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keras_lowbit.progress import table

if __package__:
    from tests.benchmarks import study_part
else:
    import study_part

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results"
# What each figure has to reach, in percent, and where the bar comes from.
BARS = {
    "resnet8_cifar10_w8a8": (87.0, "MLPerf Tiny's own int8 file: 86.97"),
    "resnet8_cifar10_w4a8": (86.7, "at most 5 epochs"),
    "resnet8_cifar10_w4a4": (86.6, "at most 20 epochs"),
    "resnet20_cifar10_w8a8": (91.58, "float - 0.15"),
    "resnet20_cifar10_w4a4": (91.4, "at most 20 epochs"),
}


def keep(folder: Path) -> None:
    """Copy a run's metrics, without the paths of the machine it ran on."""
    metrics = json.loads((folder / "metrics.json").read_text())
    recipe = metrics["recipe"]
    for section, key in (("data", "name"), ("model", "weights")):
        recipe[section][key] = Path(recipe[section][key]).name
    KEPT.mkdir(parents=True, exist_ok=True)
    target = KEPT / f"{recipe['name']}.json"
    target.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")


def percent(scored):
    low, high = scored["interval"]
    return f"{scored['accuracy']:.2%} ({low:.1%}-{high:.1%})"


def recipe_rows():
    for path in sorted(KEPT.glob("*_cifar10_*.json")):
        metrics = json.loads(path.read_text())
        accuracy, files = metrics["accuracy"], metrics["files"]
        epochs = metrics["recipe"]["train"]["epochs"]
        name = metrics["recipe"]["name"]
        bar, why = BARS.get(name, (None, ""))
        for weights in metrics["recipe"]["export"]["weights"]:
            file = files[f"model_{weights}.tflite"]
            reached = accuracy[weights]["accuracy"]
            verdict = "" if bar is None else ("yes" if 100 * reached >= bar else "NO")
            yield (
                name,
                weights,
                epochs,
                f"{accuracy['float']['accuracy']:.2%}",
                f"{accuracy['quantized']['accuracy']:.2%}",
                percent(accuracy[weights]),
                f"{accuracy[weights]['agreement']:.2%}",
                f"{file['bytes']:,}",
                f"{file['wrong_codes']} of {file['compared_codes']:,}",
                "" if bar is None else f"{bar} ({why})",
                verdict,
            )


def page() -> str:
    """The whole page."""
    columns = (
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
        "are those of the exported file on the 10,000 test images, which were looked at once.\n",
        "## CIFAR-10\n",
        "`keras-lowbit train configs/RECIPE.toml --data cifar10.npz --weights FLOAT --out RUN`\n",
        table("", columns, list(recipe_rows())).strip(),
        "",
    ]
    mobile = KEPT / "mobilenet_v2_w8a8.json"
    if mobile.is_file():
        parts += mobile_part(json.loads(mobile.read_text()))
    parts += study_part.part(KEPT / "study")
    return "\n".join(parts) + "\n"


def mobile_part(found):
    """MobileNetV2 against the peer's file."""

    def peer(key):
        return f"{found[f'peer_{key}']:.1%}" if f"peer_{key}" in found else ""

    rows = [
        ("top-1 agreement with float", f"{found['agreement']:.1%}", peer("agreement")),
        ("logit signal-to-noise ratio", f"{found['snr_db']:.1f} dB", ""),
        (f"accuracy (float {found['float_accuracy']:.1%})", percent(found), peer("accuracy")),
        ("wrong codes, 4 images", found["wrong_codes"], ""),
        ("bytes, same ends", found.get("same_ends_bytes", ""), found.get("peer_bytes", "")),
        ("convert, seconds", found["convert_s"], ""),
    ]
    if "latency" in found:
        ratio = found["latency"]
        times = (f"{ratio['ours_ms']:.2f} ms", f"{ratio['theirs_ms']:.2f} ms")
        rows.append((f"latency, ratio {ratio['ratio']:.3f}", *times))
    return [
        "## MobileNetV2 1.0 at 224 px, post-training w8a8\n",
        "`python tests/benchmarks/mobilenet_v2.py --images X.npz --weights FLOAT.weights.h5`",
        "`--peer PEER.tflite --out docs/results/mobilenet_v2_w8a8.json`; calibrated on",
        f"even-numbered images, measured on the {found['images']} odd-numbered ones through the",
        "exported file.",
        "The peer is Google's int8 file of the same weights.\n",
        table("", ("", "this library", "peer"), rows).strip(),
        "",
    ]


def main():
    for folder in sys.argv[1:]:
        keep(Path(folder))
    (ROOT / "docs" / "results.md").write_text(page())


if __name__ == "__main__":
    main()
