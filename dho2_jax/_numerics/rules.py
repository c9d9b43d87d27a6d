# SPDX-License-Identifier: Apache-2.0
"""What a rule for the base's rate s is: a few functions on a state of its own.

A rule that measures keeps a direction: the base's last update off the subspace. It is
shown the slope along it in every step (`observe`), says when it wants to know the
curvature along it (`wants_probe`; `is_unprobed` where `update` had no loss to measure
with), and takes that in (`first_probe`, `later_probe`). Its state has the fields of
`rates.RateState` that the step keeps for it: direction, length, steps, probed, taken,
ahead, scale, cuts and reach. That of a rule that measures nothing may be anything.

Another rule is a file with such functions and a line in `RULES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dho2_jax._numerics import fixed_rate, rates
from dho2_jax._types import Array


class Rule(NamedTuple):
    """A rule for s; the functions are pure and traced."""

    start: Callable[[Any], Any]  # direction -> state, before the first step
    measures: bool  # whether it keeps a direction; its steps are then bounded too
    observe: Callable[..., Any]  # state, slope, comparable -> state
    wants_probe: Callable[..., Array]  # state, often -> (), bool
    is_unprobed: Callable[[Any], Array]  # state -> (), bool
    first_probe: Callable[..., Any]  # state, slope, d . H d -> state
    later_probe: Callable[..., Any]  # state, |d . H d| / |d|^2, |d|^2, cap -> state
    scale: Callable[..., Array]  # state, spread of the kept curvature, cap -> s
    cap: float  # on s, by default
    negative_curvature: str  # by default

    def direction(self, state: Any) -> Any:
        """Returns what slopes and curvature are measured along; None: nothing is."""
        return state.direction if self.measures else None


def _of_state(state: rates.RateState, spread: Array, cap: Array) -> Array:
    return state.scale


RULES = {
    "curvature": Rule(
        start=rates.start,
        measures=True,
        observe=rates.observe,
        wants_probe=rates.is_due,
        is_unprobed=rates.is_unprobed,
        first_probe=rates.first_scale,
        later_probe=rates.adjust,
        scale=_of_state,
        cap=float("inf"),
        negative_curvature="base",
    ),
    "fixed": Rule(
        start=fixed_rate.start,
        measures=False,
        observe=fixed_rate.unchanged,
        wants_probe=fixed_rate.never,
        is_unprobed=fixed_rate.never,
        first_probe=fixed_rate.unchanged,
        later_probe=fixed_rate.unchanged,
        scale=fixed_rate.scale,
        cap=3.0,  # FOSI's
        negative_curvature="abs",
    ),
}
"""What `base_rate=` may be."""
