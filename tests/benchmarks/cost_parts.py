"""Parts of `docs/results.md` about time and memory."""

from __future__ import annotations

from keras_lowbit.progress import table
from tests.benchmarks.peers.run import COLUMNS as PEER_COLUMNS
from tests.benchmarks.peers.run import cells as peer_cells

# Speed of a quantized training step over the float one, by backend and net; in the plain form of
# `keras.ops` on the processor that the bars come from. Where that form does much worse, a gain of a
# quarter over it is the bar.
PLAIN_THERE = {("torch", "resnet20"): 0.73, ("tensorflow", "mobilenet_v2"): 0.63}
MUCH_WORSE, GAIN = 0.9, 1.25
STEP_BARS = {
    ("tensorflow", "resnet20"): 0.90,
    ("jax", "resnet20"): 0.93,
    ("torch", "resnet20"): 0.80,
    ("tensorflow", "mobilenet_v2"): 0.80,
}


def step_part(found):
    """Training steps of one backend."""
    rows = []
    nets = {net: times for net, times in found.items() if isinstance(times, dict)}
    for net, times in nets.items():
        ratios = ("ratio", "gain")
        each = [f"{form} {1000 * s:.0f} ms" for form, s in times.items() if form not in ratios]
        bar = STEP_BARS.get((found["backend"], net))
        plain_there = PLAIN_THERE.get((found["backend"], net))
        reached = "" if bar is None else _verdict(bar, plain_there, times)
        gain = f"{times['gain']:.2f}" if "gain" in times else ""
        rows.append((net, ", ".join(each), f"{times['ratio']:.2f}", bar or "", reached, gain))
    columns = ("net", "times", "speed over float", "bar", "reached", "speed over keras.ops alone")
    return [
        f"## Training step of {' and '.join(nets)} on {found['backend']}\n",
        "`python tests/benchmarks/training_step.py --keras-ops`",
        f"`--json docs/results/step_BACKEND.json`: {found['scheme']} over the same",
        f"float model, steps in turn, medians, {found['processor']}.\n",
        table("", columns, rows).strip(),
        "",
    ]


def _verdict(bar, plain_there, times):
    if times["ratio"] >= bar:
        return "yes"
    if plain_there is not None and "gain" in times:
        plain_here = times["ratio"] / times["gain"]
        if plain_here < MUCH_WORSE * plain_there and times["gain"] >= GAIN:
            return f"yes, by gain: keras.ops {plain_here:.2f} here, {plain_there} there"
    return "NO"


def peers_part(rows):
    """Training steps of other libraries, each over its own float net."""
    processors = sorted({row["processor"] for row in rows if "processor" in row})
    return [
        "## Training speed beside other libraries\n",
        '`make bench-peers PEERS_ARGS="--json docs/results/peers.json"`: one training step of',
        "ResNet-20, batch 128, quantized over the float net of the same framework, steps in turn.",
        f"Only ratios compare between frameworks. {', '.join(processors)}.\n",
        table("", PEER_COLUMNS, [peer_cells(row) for row in rows]).strip(),
        "",
        "Keras 3 computes a batch norm by several operations, tf-keras by one, and so does",
        "`quantize_model`: that is a part of the ratio above, and the reason why float steps of",
        "tf-keras are shorter. Nor do QKeras, TFMOT and Larq learn scales by gradient.",
        "",
    ]


def methods_part(found):
    """Cost of the training methods."""
    rows = [(name, f"{ms:.0f}", f"{found['ratio'][name]:.2f}") for name, ms in found["ms"].items()]
    return [
        "## Cost of the training methods\n",
        '`make bench METHOD_ARGS="--json docs/results/method_step.json"`: one training step of',
        f"{found['net']}, batch {found['batch']}, on {found['backend']}, {found['processor']}.\n",
        table("", ("method", "ms", "time over plain LSQ"), rows).strip(),
        "",
    ]


def import_part(found):
    """What the import adds."""
    reached = "yes" if found["added_s"] <= found["bar_s"] else "NO"
    row = tuple(f"{found[key]:.3f}" for key in ("keras_s", "added_s", "bar_s"))
    return [
        "## Import\n",
        "`python tests/benchmarks/import_time.py --json docs/results/import_time.json`: medians of",
        f"fresh processes, seconds, on {found['backend']}, {found['processor']}.\n",
        table(
            "", ("import keras", "keras_lowbit adds", "bar", "reached"), [(*row, reached)]
        ).strip(),
        "",
    ]


def convert_part(found):
    """Seconds and memory of a conversion."""
    row = tuple(f"{found[key]:,.1f}" for key in ("convert_s", "before_mib", "added_mib"))
    return [
        "## Conversion\n",
        "`python tests/benchmarks/convert_cost.py --json docs/results/convert_cost.json`:",
        f"MobileNetV2 at {found['size']} px, {found['scheme']}, in a process of its own,",
        f"{found['processor']}.\n",
        table(
            "", ("seconds", "MiB with the model loaded", "MiB at the peak on top"), [row]
        ).strip(),
        "",
    ]


def load_part(found):
    """Seconds to load a model of the zoo."""
    reached = "yes" if found["reached"] else "NO"
    row = tuple(f"{found[key]:.2f}" for key in ("import", "load", "seconds", "bar"))
    columns = ("import keras_lowbit", "zoo.load", "both", "bar", "reached")
    return [
        f"## Loading {found['name']} on {found['backend']}\n",
        f"`python tests/benchmarks/load_time.py {found['name']}`",
        "`--out docs/results/load_BACKEND.json`: seconds after `import keras`, medians of",
        f"{found['runs']} fresh processes, {found['processor']}.\n",
        table("", columns, [(*row, reached)]).strip(),
        "",
    ]


# File of `docs/results/` to what is written from it.
PARTS = {
    "step_tensorflow": step_part,
    "step_tensorflow_mobilenet": step_part,
    "step_jax": step_part,
    "step_torch": step_part,
    "peers": peers_part,
    "method_step": methods_part,
    "import_time": import_part,
    "convert_cost": convert_part,
    "load_tensorflow": load_part,
    "load_torch": load_part,
    "load_jax": load_part,
}
