"""A data set of numbered images in two halves: even numbers train, odd ones measure.

    python zoo/split_npz.py IMAGES.npz OUT.npz

IMAGES.npz holds `x` (uint8, sorted by class) and `y`. The first half is shuffled by a fixed seed,
since recipes calibrate on the first images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def split(x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays as `keras_lowbit.data` reads them; as many classes as the largest label tells."""
    order = 2 * np.random.default_rng(seed).permutation((len(x) + 1) // 2)
    return {
        "x_train": x[order],
        "y_train": y[order],
        "x_test": x[1::2],
        "y_test": y[1::2],
        "classes": np.array([str(k) for k in range(int(y.max()) + 1)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        with np.load(given.images) as stored:
            x, y = stored["x"], stored["y"]
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{given.images} is no .npz with x and y: {error}")
    np.savez(given.out, **split(x, y))


if __name__ == "__main__":
    main()
