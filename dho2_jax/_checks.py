# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: the name, the rule, the value and a remedy, in one sentence."""

import difflib
import numbers
from typing import Any, cast

import jax
import numpy as np


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises unless `value` is a Python (or NumPy) integer of at least `least`."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if isinstance(value, jax.Array) or not is_integer:
        raise ValueError(
            f"`{name}` must be a static integer, got {shown(value)}; under "
            "optax.inject_hyperparams pass static_args=dho2_jax.STATIC_ARGS."
        )
    if value < least:
        raise ValueError(f"`{name}` must be >= {least}, got {value}; raise it.")


def check_steps(name: str, value: Any) -> tuple[int, ...]:
    """Returns `value` as a tuple of steps >= 1, or raises."""
    if not isinstance(value, tuple | list):
        raise ValueError(
            f"`{name}` must be a tuple of steps, got {shown(value)}; "
            "pass for example (20, 50), or ()."
        )
    for step in value:
        check_integer(name, step, 1)
    return tuple(int(step) for step in value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`; names the nearest."""
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"the nearest is '{near[0]}'" if near else "choose one of them"
    options = ", ".join(f"'{c}'" for c in choices)
    raise ValueError(f"`{name}` must be one of {options}, got {shown(value)}; {hint}.")


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raises when a plain number is out of range; JAX scalars and schedules pass."""
    if callable(value) or (isinstance(value, jax.Array) and value.shape == ()):
        return
    is_number = isinstance(value, numbers.Real | np.ndarray)
    if isinstance(value, bool) or not is_number or np.shape(cast(Any, value)) != ():
        raise ValueError(
            f"`{name}` must be a number, a scalar array or a schedule, got "
            f"{shown(value)}; pass one number, or a function of the step count."
        )
    number = float(cast(float, value))
    inside = number >= low and (high is None or number < high)
    if not inside:
        rule = f">= {low:g}" if high is None else f"in [{low:g}, {high:g})"
        raise ValueError(
            f"`{name}` must be {rule}, got {value}; choose a value in that range."
        )


def shown(value: Any) -> str:
    """A value and its type on one short line."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
