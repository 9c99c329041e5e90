"""Time of one training step, quantized over float, alternating in one process.

    KERAS_BACKEND=tensorflow python tests/benchmarks/training_step.py [--nets resnet20]
        [--rounds 7] [--keras-ops] [--json OUT]

Prints absolute times and the ratio of the fastest quantized to the fastest float form. Medians of
alternating steps; run it on an idle machine. `--keras-ops` also times the quantized model without
this library's faster forms of its operations (`numerics.backend`), for their gain. Both nets train
as under `keras-lowbit train`: the allocator keeps memory between steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
from keras_lowbit.cli.allocator import keep_memory
from keras_lowbit.numerics import backend
from keras_lowbit.progress import table
from tests.benchmarks.clock import alternate, fastest, processor

NETS = {"resnet20": ((32, 32, 3), 128), "mobilenet_v2": ((96, 96, 3), 16)}


def float_net(name):
    """The float model of a benchmark."""
    shape, _ = NETS[name]
    if name == "mobilenet_v2":
        return keras.applications.MobileNetV2(weights=None, input_shape=shape, classes=100)
    return klb.zoo.build(name, input_shape=shape)


@contextlib.contextmanager
def keras_ops_only():
    """Inside the block operations take their plain form in `keras.ops`."""
    fast = backend._fast
    backend._fast = lambda *_: None
    try:
        yield
    finally:
        backend._fast = fast


def step_in_keras_ops(model, x, y):
    """A training step in the plain form; on TensorFlow the first one decides for all."""
    with keras_ops_only():
        return model.train_on_batch(x, y)


def forms(name, scheme, wanted):
    """`{label: compiled model}`; one that Keras compiles whole and one that it does not."""
    shape, _ = NETS[name]
    images = np.random.default_rng(0).integers(0, 256, (16, *shape)).astype("float32")
    choices = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}
    choices = choices[keras.backend.backend()]
    made = {}
    for jit in choices if wanted == "all" else (wanted == "jit",):
        net = float_net(name)
        quantized = klb.calibrate(klb.quantize_model(net, scheme), images)
        for kind, model in (("float", net), (scheme, quantized)):
            logits = model.layers[-1].name in ("linear", f"{name}_dequantize")
            model.compile(
                optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=logits),
                jit_compile=jit,
            )
            made[kind, "jit" if jit else "plain"] = model
    return made


def measure(name, scheme, rounds, wanted, plain_too):
    """Median seconds of a step by form."""
    shape, batch = NETS[name]
    random = np.random.default_rng(1)
    x = random.integers(0, 256, (batch, *shape)).astype("float32")
    y = random.integers(0, 10, batch)
    models = forms(name, scheme, wanted)
    # `train_on_batch` returns numbers, so a step is done when it returns.
    steps = {form: functools.partial(m.train_on_batch, x, y) for form, m in models.items()}
    if plain_too:
        for (kind, form), model in forms(name, scheme, wanted).items():
            if kind != "float":
                label = (f"{kind}, keras.ops", form)
                steps[label] = functools.partial(step_in_keras_ops, model, x, y)
    return alternate(steps, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", default="all", choices=("all", "plain", "jit"))
    parser.add_argument("--keras-ops", action="store_true")
    parser.add_argument("--json", "--out", dest="json")
    given = parser.parse_args()
    keep_memory()
    rows, kept = [], {}
    for name in given.nets:
        found = measure(name, given.scheme, given.rounds, given.forms, given.keras_ops)
        best = fastest(found)
        ratio = best["float"] / best[given.scheme]
        for (kind, form), seconds in found.items():
            rows.append(
                (name, kind, form, f"{1000 * seconds:.0f}", f"{NETS[name][1] / seconds:.0f}")
            )
        rows.append((name, "speed, quantized over float", "fastest", "", f"{ratio:.2f}"))
        kept[name] = {f"{k} {f}": s for (k, f), s in found.items()} | {"ratio": ratio}
        if given.keras_ops:
            gain = best[f"{given.scheme}, keras.ops"] / best[given.scheme]
            rows.append((name, "speed, quantized over its keras.ops form", "", "", f"{gain:.2f}"))
            kept[name]["gain"] = gain
    where = {"backend": keras.backend.backend(), "processor": processor(), "scheme": given.scheme}
    title = f"one training step on {where['backend']}, {where['processor']}"
    print(table(title, ("net", "model", "form", "ms", "images/s"), rows))
    if given.json:
        kept |= {
            "backend": keras.backend.backend(),
            "processor": processor(),
            "scheme": given.scheme,
        }
        Path(given.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
