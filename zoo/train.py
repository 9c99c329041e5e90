r"""Train a list of recipes, one after the other, inside a time limit.

    python zoo/train.py configs/A.toml configs/B.toml --data X.npz --weights F --out RUNS \
        --minutes 60

Each run has its own folder `RUNS/<recipe>` and goes on there when the command is given again;
finished ones are skipped. At the limit the run under way is stopped; its snapshots stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs import Job, add_arguments, run_jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    add_arguments(parser)
    given = parser.parse_args()
    missing = [str(recipe) for recipe in given.recipes if not recipe.is_file()]
    if missing:
        parser.error(f"no such recipe: {', '.join(missing)}")
    run_jobs([Job(recipe, given.out / recipe.stem) for recipe in given.recipes], given)


if __name__ == "__main__":
    main()
