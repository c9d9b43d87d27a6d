# SPDX-License-Identifier: Apache-2.0
"""FOSI's rate: the spread of the kept curvature, and nothing measured along the way."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dho2_jax._types import Array


class FixedState(NamedTuple):
    """Nothing to remember."""


def start(_: Any) -> FixedState:
    """Returns the rule before its first step."""
    return FixedState()


def unchanged(state: FixedState, *_: Any) -> FixedState:
    """Returns the rule after whatever was seen."""
    return state


def never(*_: Any, **__: Any) -> Array:
    """Returns whether a probe is wanted: `()`, bool."""
    return jnp.zeros((), bool)


def scale(state: FixedState, spread: Array, cap: Array) -> Array:
    """Returns s = clip(lambda_max / lambda_min kept of the largest, 1, c)."""
    return jnp.clip(spread, 1.0, cap)
