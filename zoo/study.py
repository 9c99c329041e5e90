r"""What each training method buys: every recipe of `configs/study/`, with several seeds.

    python zoo/study.py --data cifar10.npz --weights FLOAT --out RUNS --minutes 600 \
        [--arms 'w2a2_*'] [--seeds 1] [--parallel 2]

Runs what is not done yet, the first seed of every arm before the second of any, and stops at the
time limit; given again, the command goes on. What was measured is kept in `docs/results/study/`,
one small file a run, from which `tests/benchmarks/write_results.py` writes the tables: a run that
is kept there is not run again, whatever lies in RUNS.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path

from jobs import Job, add_arguments, run_jobs

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results" / "study"
# Seeds of the arms of a scheme, which their names begin with.
SEEDS = {"w2a2": 3, "wta8": 1, "w1a1": 1}
# What the other arms of a scheme are compared with, so it runs first.
BASELINES = ("one_shot", "plain")


def arms(pattern: str) -> list[Path]:
    """Recipes of the study, in the order of `SEEDS`, baselines first."""
    schemes = list(SEEDS)

    def place(path):
        scheme, _, method = path.stem.partition("_")
        return schemes.index(scheme), method not in BASELINES, method

    found = sorted((ROOT / "configs" / "study").glob("*.toml"), key=place)
    return [path for path in found if fnmatch.fnmatchcase(path.stem, pattern)]


def kept_path(job: Job) -> Path:
    """Where the figures of a run are kept."""
    return KEPT / f"{job.out.name}.json"


def keep(job: Job) -> None:
    """The figures of a finished run, without anything of the machine it ran on."""
    metrics = json.loads((job.out / "metrics.json").read_text())
    scored = metrics["accuracy"]
    summary = {
        "arm": metrics["recipe"]["name"],
        "seed": metrics["recipe"]["train"]["seed"],
        "epochs": metrics["recipe"]["train"]["epochs"],
        "backend": metrics["backend"],
        "seconds": metrics["train_seconds"],
        "float": scored["float"]["accuracy"],
        "held_out": metrics["history"][-1].get("val_accuracy"),
        "accuracy": scored["int8"]["accuracy"],
        "images": scored["int8"]["images"],
        "wrong_codes": metrics["files"]["model_int8.tflite"]["wrong_codes"],
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    kept_path(job).write_text(json.dumps(summary, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--arms", default="*", help="pattern of names, such as 'w2a2_*'")
    parser.add_argument("--seeds", type=int, help="at most so many of each arm")
    given = parser.parse_args()
    chosen = arms(given.arms)
    if not chosen:
        parser.error(f"no arm matches {given.arms!r}: {', '.join(p.stem for p in arms('*'))}")
    rounds = [
        Job(recipe, given.out / f"{recipe.stem}_s{seed}", (f"--seed={seed}",))
        for seed in range(max(SEEDS.values()))
        for recipe in chosen
        if seed < min(SEEDS[recipe.stem.split("_")[0]], given.seeds or seed + 1)
    ]
    left = [job for job in rounds if not kept_path(job).is_file()]
    print(f"study: {len(rounds) - len(left)} of {len(rounds)} runs are kept in {KEPT}")
    run_jobs(left, given, keep)


if __name__ == "__main__":
    main()
