r"""Train a list of recipes, one after the other, inside a time limit.

    python zoo/train.py configs/A.toml configs/B.toml --data X.npz --weights F --out RUNS \
        --minutes 60

Each run has its own folder `RUNS/<recipe>` and goes on there when the command is given again;
finished ones are skipped. At the limit the run under way is stopped; its snapshots stay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--data", default="", help="instead of the recipes' data")
    parser.add_argument("--weights", default="", help="float weights for all recipes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit for all")
    parser.add_argument("--backend", default="tensorflow")
    arguments = parser.parse_args()
    missing = [str(recipe) for recipe in arguments.recipes if not recipe.is_file()]
    if missing:
        parser.error(f"no such recipe: {', '.join(missing)}")
    end = time.monotonic() + 60 * arguments.minutes
    failed = []
    for recipe in arguments.recipes:
        out = arguments.out / recipe.stem
        if (out / "metrics.json").is_file():
            print(f"{recipe.stem}: done before, see {out}")
            continue
        command = [sys.executable, "-m", "keras_lowbit.cli", "train", str(recipe)]
        command += ["--out", str(out), "--backend", arguments.backend]
        for flag in ("data", "weights"):
            if getattr(arguments, flag):
                command += [f"--{flag}", getattr(arguments, flag)]
        left = None if arguments.minutes == float("inf") else end - time.monotonic()
        try:
            code = subprocess.run(
                command, timeout=None if left == float("inf") else left
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{recipe.stem}: stopped at the time limit; run the command again to go on")
            break
        if code:
            failed.append(recipe.stem)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
