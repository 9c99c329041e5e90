"""Checks of arguments that all floors share."""

from __future__ import annotations

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
