"""Parts of `docs/results.md` about MobileNetV2 on calibration images."""

from __future__ import annotations

import json

from keras_lowbit.cli.recipe import refines_codes
from keras_lowbit.progress import table

# Least agreement in percent and signal-to-noise ratio in dB after reconstruction.
RECONSTRUCTION_BARS = {"w8a8": (99, 20), "w4a8": (90, None), "w4a4": (77, None)}


def percent(scored):
    """Accuracy with its interval."""
    low, high = scored["interval"]
    return f"{scored['accuracy']:.2%} ({low:.1%}-{high:.1%})"


def mobile_part(found):
    """MobileNetV2 against the peer's file."""

    def peer(key):
        return f"{found[f'peer_{key}']:.1%}" if f"peer_{key}" in found else ""

    rows = [
        ("top-1 agreement with float", f"{found['agreement']:.1%}", peer("agreement")),
        (
            "logit signal-to-noise ratio, before a softmax",
            f"{found['snr_db']:.1f} dB",
            f"{found['peer_snr_db']:.1f} dB" if "peer_snr_db" in found else "",
        ),
        (f"accuracy (float {found['float_accuracy']:.1%})", percent(found), peer("accuracy")),
        ("wrong codes, 4 images", found["wrong_codes"], ""),
        ("bytes, same ends", found.get("same_ends_bytes", ""), found.get("peer_bytes", "")),
        ("convert, seconds", found["convert_s"], ""),
    ]
    if "convert_memory" in found:
        rows.append(("convert, MiB at the peak", found["convert_memory"]["added_mib"], ""))
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


def reconstruction_part(found):
    """Block reconstruction, a row before and one after for each scheme."""
    rows = []
    for run in found:
        bar, decibels = RECONSTRUCTION_BARS.get(run["scheme"], (None, None))
        for stage in ("calibrated", "reconstructed"):
            of = run[stage]
            after = stage == "reconstructed"
            reached = ""
            if after and bar is not None:
                enough = 100 * of["agreement"] >= bar and of["snr_db"] >= (decibels or -100)
                reached = "yes" if enough else "NO"
            shown = "" if bar is None else f"{bar} %" + (f", {decibels} dB" if decibels else "")
            rows.append(
                (
                    f"{run['scheme']} {stage}",
                    run["steps"] if after else "",
                    f"{of['agreement']:.1%}",
                    f"{of['snr_db']:.1f} dB",
                    percent(of),
                    of.get("wrong_codes", ""),
                    f"{run['reconstruct_s'] / 60:.0f}" if after else "",
                    shown if after else "",
                    reached,
                )
            )
    columns = (
        "",
        "steps a block",
        "agreement",
        "logit SNR",
        f"accuracy (float {found[0]['float_accuracy']:.1%})",
        "wrong codes",
        "minutes",
        "bar",
        "reached",
    )
    return [
        "## Block reconstruction of MobileNetV2, without labels\n",
        "`python tests/benchmarks/reconstruction.py --images X.npz --weights FLOAT.weights.h5`",
        "`--out docs/results/mobilenet_v2_reconstruction.json`; tuned on even-numbered images,",
        f"measured on the {found[0]['images']} odd-numbered ones through the exported file.\n",
        table("", columns, rows).strip(),
        "",
    ]


def recipes_part(folder):
    """Recipes on calibration images, from the metrics of their runs; nothing where none ran."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        metrics = json.loads(path.read_text())
        recipe, accuracy = metrics["recipe"], metrics["accuracy"]
        bar, _ = RECONSTRUCTION_BARS.get(recipe["quantize"]["scheme"], (None, None))
        for kind in recipe["export"]["weights"]:
            scored, file = accuracy[kind], metrics["files"][f"model_{kind}.tflite"]
            agreement = scored["float_agreement"]
            rows.append(
                (
                    recipe["name"],
                    kind,
                    *_tuning(recipe),
                    f"{agreement:.1%}",
                    f"{scored['agreement']:.1%}",
                    percent(scored),
                    f"{file['bytes']:,}",
                    f"{file['wrong_codes']} of {file['compared_codes']:,}",
                    "" if bar is None else f"{bar} %",
                    "" if bar is None else ("yes" if 100 * agreement >= bar else "NO"),
                )
            )
    if not rows:
        return []
    columns = (
        "recipe",
        "file",
        *TUNING,
        "as float",
        "as Keras",
        "accuracy",
        "bytes",
        "wrong codes",
        "bar",
        "reached",
    )
    return [
        "## MobileNetV2 of the zoo: block reconstruction by recipe, without labels\n",
        "`keras-lowbit train configs/RECIPE.toml --data imagenet_calibration.npz --weights FLOAT`",
        "`--out RUN`, images split by `zoo/split_npz.py`: even-numbered ones tune, odd-numbered",
        "ones measure how often a file answers as the float and as the Keras model do.\n",
        table("", columns, rows).strip(),
        "",
        *_earlier(folder / "earlier"),
    ]


# Columns of how a recipe tunes.
TUNING = (
    "other bits",
    "steps a block",
    "views",
    "start",
    "logits",
    "channels",
    "means",
    "own rates",
    "steps as a whole",
)


def _tuning(recipe):
    """`TUNING` of a recipe; keys that older ones lack had these values."""
    tuned = recipe["reconstruct"]
    views = str(tuned["views"])
    if tuned["views"]:
        views += f" of {tuned.get('zoom', 0.6)}..1"
    levelled = recipe["model"].get("rescale") or "as they are"
    start = tuned.get("rounding", "nearest")
    if start == "data" and "block_steps" not in tuned:
        start = "data in all blocks"  # before those with few positions kept the nearest codes
    counts = [tuned["steps"], *tuned.get("block_steps", {}).values()]
    steps = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else counts[0]
    refined = recipe.get("refine", {"steps": 0})
    whole = str(refined["steps"])
    if refined["steps"] and refines_codes(refined):
        whole += ", codes too"
    others = ", ".join(f"{name} {bits}" for name, bits in recipe["quantize"]["exceptions"].items())
    means = "matched" if tuned.get("match_means") else "as trained"  # of the blocks' outputs
    rates = ", ".join([*(["all"] if tuned.get("rates") else []), *tuned.get("block_rates", {})])
    logits = str(tuned.get("logit_weight", 0.0))
    if tuned.get("logit_blocks", 1) > 1:
        logits += f", last {tuned['logit_blocks']} as one"
    return others, steps, views, start, logits, levelled, means, rates, whole


def _earlier(folder):
    """Recipes that are not the zoo's, for which the same images were looked at."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        metrics = json.loads(path.read_text())
        scored = metrics["accuracy"]["int8"]
        agreement = f"{scored['float_agreement']:.1%}"
        rows.append(
            (metrics["recipe"]["name"], *_tuning(metrics["recipe"]), agreement, percent(scored))
        )
    if not rows:
        return []
    return [
        "Other recipes, whose odd-numbered images were looked at too:\n",
        table("", ("recipe", *TUNING, "as float", "accuracy"), rows).strip(),
        "",
    ]


def thresholds_part(found):
    """The ladder of trained thresholds."""
    rows = [
        (
            row["rung"],
            row.get("epochs", ""),
            f"{row['agreement']:.1%}",
            f"{row['snr_db']:.1f} dB",
            percent(row),
            row.get("wrong_codes", ""),
        )
        for row in found
    ]
    trained = [row["epochs"] for row in found if "epochs" in row]
    epochs = f"--epochs {trained[0]} " if trained else ""
    columns = ("w8a8", "epochs", "agreement", "logit SNR", "accuracy", "wrong codes")
    return [
        "## Trained thresholds on MobileNetV2, without labels\n",
        "`python tests/benchmarks/thresholds.py --images X.npz --weights FLOAT.weights.h5`",
        f"`{epochs}--out docs/results/mobilenet_v2_thresholds.json`; images as above.\n",
        table("", columns, rows).strip(),
        "",
    ]


# File of `docs/results/` to what is written from it.
PARTS = {
    "mobilenet_v2_w8a8": mobile_part,
    "mobilenet_v2_reconstruction": reconstruction_part,
    "mobilenet_v2_thresholds": thresholds_part,
}
