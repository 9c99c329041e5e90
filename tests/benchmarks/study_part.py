"""The part of `docs/results.md` about training methods, from `docs/results/study/`."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from keras_lowbit.cli.methods import cycle_epochs
from keras_lowbit.cli.recipe import Recipe, read_recipe
from keras_lowbit.progress import table

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "study"
# Share of the steps after which `StochasticPrecision` quantizes everything, as recipes use it.
RAMP = 0.6
# What an arm is compared with: the arm of its scheme that uses no method.
PLAIN = {"w2a2": "w2a2_one_shot", "wta8": "wta8_plain", "w1a1": "w1a1_one_shot"}


def read(folder: Path) -> dict[str, list[dict]]:
    """Runs by arm, ordered by seed."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: (run["arm"], run["seed"])):
        found.setdefault(run["arm"], []).append(run)
    return found


def mean_and_error(accuracies, images) -> tuple[float, float]:
    """Mean and its standard error.

    Seeds give the error where there are some. It is never below the one of the images themselves,
    `sqrt(p (1 - p) / images)` over `sqrt(seeds)`: three seeds can agree by chance.
    """
    mean, count = statistics.fmean(accuracies), len(accuracies)
    floor = math.sqrt(mean * (1 - mean) / images)
    spread = statistics.stdev(accuracies) if count > 1 else 0.0
    return mean, max(spread, floor) / math.sqrt(count)


def verdict(difference: float, error: float) -> str:
    """A difference in points, or that there is none to be seen."""
    if abs(difference) < 2 * error:
        return f"not distinguishable ({100 * difference:+.2f})"
    return f"{100 * difference:+.2f}"


def deployed_epochs(recipe: Recipe) -> float:
    """Epochs that train the net as it is deployed: at its last bits, all of it quantized."""
    methods, train = recipe.methods, recipe.train
    epochs, descent = train.epochs, max(map(int, train.bit_descent), default=0)
    if methods.cycles:
        each, _ = cycle_epochs(methods, train)
        return methods.cycles * (each - descent)
    if methods.stochastic < 1:
        epochs *= 1 - RAMP
    return epochs - max(descent, methods.switch_epoch)


def rows(found: dict[str, list[dict]]) -> list[tuple]:
    """One row an arm, the plain one of each scheme first."""
    made = []
    for scheme, plain in PLAIN.items():
        of_scheme = [name for name in found if name.split("_")[0] == scheme]
        base = None
        for name in sorted(of_scheme, key=lambda name: (name != plain, name)):
            runs = found[name]
            reached = [run["accuracy"] for run in runs]
            mean, error = mean_and_error(reached, runs[0]["images"])
            if name == plain:
                base = (mean, error)
            against = ""
            if base is not None and name != plain:
                against = verdict(mean - base[0], math.hypot(error, base[1]))
            each = ", ".join(f"{100 * one:.2f}" for one in reached)
            epochs = runs[0]["epochs"]
            deployed = f"{deployed_epochs(read_recipe(RECIPES / f'{name}.toml')):g}"
            made.append((name, epochs, deployed, each, f"{mean:.2%}", f"{error:.2%}", against))
    return made


def part(folder: Path) -> list[str]:
    """Lines of the page; none where nothing was run."""
    found = read(folder)
    if not found:
        return []
    columns = (
        "arm",
        "epochs",
        "as deployed",
        "file, each seed",
        "mean",
        "standard error",
        "against plain",
    )
    wrong = sum(run["wrong_codes"] for runs in found.values() for run in runs)
    count = sum(map(len, found.values()))
    backends = Counter(run["backend"] for runs in found.values() for run in runs)
    trained = ", ".join(f"{many} on {backend}" for backend, many in backends.most_common())
    return [
        "## What each training method buys: ResNet-8 on CIFAR-10\n",
        "`python zoo/study.py --data cifar10.npz --weights FLOAT --out RUNS`",
        "",
        "Equal total epochs, test images looked at once. The standard error comes from the seeds,",
        "and is at least that of the test images. Differences below two standard errors are not",
        f"distinguishable. {count} runs ({trained}, with the same batches), {wrong} wrong codes in",
        "their files.",
        "",
        "*As deployed*: the epochs in which the whole net trains at the bits it ends with. From a",
        "float start and with eight epochs in all these count most: arms whose bits fall have not",
        "made up for what they spent above their last bits, least of all the cycles.\n",
        table("", columns, rows(found)).strip(),
        "",
    ]
