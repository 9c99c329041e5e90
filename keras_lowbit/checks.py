"""Checks of arguments that all floors share."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np


def checked_count(value: Any, *, who: str, least: int, advice: str = "") -> int:
    """`value` as an int, if it is a whole number of at least `least`; NumPy's are, bools are not.

    Args:
        value: what was given.
        who: what it was given for, such as `"Resume: every"`; the error begins with it.
        least: smallest allowed.
        advice: a sentence without its full stop; the error ends with it.

    Raises:
        ValueError: anything else.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        said = f"{who} must be a whole number of at least {least}. Got {value!r}"
        raise ValueError(f"{said}. {advice}" if advice else said)
    return int(value)


def checked_number(
    value: Any,
    *,
    who: str,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a float, if it is a finite number in the range; NumPy's are, bools are not.

    Args:
        value: what was given.
        who: what it was given for, such as `"LSQ: delta"`; the error begins with it.
        above: it must be larger.
        least: smallest allowed.
        below: it must be smaller.
        most: largest allowed.

    Raises:
        ValueError: anything else.
    """
    real = (int, float, np.integer, np.floating)
    number = isinstance(value, real) and not isinstance(value, bool) and _is_finite(value)
    limits = {"above": above, "at least": least, "below": below, "at most": most}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    if number and all(_HOLDS[w](value, x) for w, x in limits.items()):
        return float(value)
    said = " and ".join(f"{words} {limit:g}" for words, limit in limits.items())
    raise ValueError(f"{who} must be a finite number{said and ', '}{said}. Got {value!r}")


_HOLDS = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


def _is_finite(value):
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def checked_choice(value: Any, allowed: tuple, *, who: str) -> Any:
    """`value`, if it is one of `allowed`.

    Args:
        value: what was given.
        allowed: what may be given.
        who: what it was given for, such as `"LSQ: gradient"`; the error begins with it.

    Raises:
        ValueError: anything else; the nearest is suggested.
    """
    if value in allowed:
        return value
    raise ValueError(
        f"{who} must be one of {allowed}. Got {value!r}.{did_you_mean(value, allowed)}"
    )


def did_you_mean(given: Any, known: Iterable[str | None]) -> str:
    """The end of an error, with the nearest of the known names; empty where none is near."""
    near = difflib.get_close_matches(str(given), [k for k in known if k is not None], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
