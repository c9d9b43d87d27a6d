# SPDX-License-Identifier: Apache-2.0
"""A step that is not taken yet: bounded, perhaps to be tried, and then settled."""

from typing import NamedTuple

import jax.numpy as jnp

from dho2_jax._numerics import rates, reaches
from dho2_jax._state.states import Anchor, CurvatureState
from dho2_jax._types import Array

_VANISHED = 1e-6  # share of the subspace's gradient below which the complement is zero


class Proposal(NamedTuple):
    """What a step would be; `()` float32 unless said. Lengths are without schedule."""

    scale: Array  # s
    newton: Array  # coefficients of the part in the subspace, (k + l,)
    momentum: Array  # u, (k + l,)
    base_length: Array  # s |d|
    newton_length: Array
    slope: Array  # g . u of the whole step u, with the schedule
    proved: Array  # share of the step that is proved safe
    bounded: Array  # bool: shortened to what is
    bold: Array  # bool: to be tried on the loss, if there is one


class Measures(NamedTuple):
    """What is known of a step before it is bounded; `()` float32."""

    length: Array  # |d|, off the subspace
    slope: Array  # g2 . d
    inside: Array  # c0 = V g, (k + l,)
    complement: Array  # |g2|


def free(scale: Array, newton: Array, momentum: Array, length: Array) -> Proposal:
    """Returns a step without bounds: that of a rule that measures nothing."""
    return Proposal(
        scale=scale,
        newton=newton,
        momentum=momentum,
        base_length=scale * length,
        newton_length=norm(newton),
        slope=jnp.zeros((), jnp.float32),
        proved=jnp.ones((), jnp.float32),
        bounded=jnp.zeros((), bool),
        bold=jnp.zeros((), bool),
    )


def bound(
    rate: rates.RateState,
    scale: Array,
    newton: Array,
    momentum: Array,
    seen: Measures,
    schedule: Array,
    *,
    use: Array,
    fresh: Array,
    tried: bool,
) -> tuple[Proposal, rates.RateState]:
    """Bounds a step by what is proved safe, and brakes it uphill.

    Args:
      rate: The rule, with its reach, before the step.
      scale: s.
      newton: Coefficients of the part in the subspace, `(k + l,)`.
      momentum: u, `(k + l,)`. It is shortened as the Newton part is: charged while it
        could not act, it would overshoot once it can.
      seen: Of the step.
      schedule: Multiplies the whole step.
      use: Whether any slot is active; else nothing is bounded.
      fresh: Whether the subspace, or the rule, is new.
      tried: Whether the caller tries a bold step on the loss. Static.

    Returns:
      The step, and the rule.
    """
    reach = rate.reach
    own = scale * seen.length
    share = reaches.within(own, jnp.maximum(reach.base, reach.measured), tried)
    share = jnp.where(use, share, 1.0)
    # Of what is infinite nothing is taken; 0 times it would be no number.
    base = jnp.where(share > 0, share * own, 0.0)
    size = norm(newton)
    known = jnp.where(reach.newton > 0, reach.newton, base)
    factor = jnp.minimum(
        _shortening(size, norm(momentum), seen.complement, base),
        reaches.within(size, known, tried, least=base),
    )
    brake = reaches.braked(reach, use & (seen.slope > 0))
    scale, base = brake * share * scale, brake * base
    factor = jnp.where(scale > 0, factor, 0.0)
    newton, size = factor * newton, jnp.where(factor > 0, factor * size, 0.0)
    proved = jnp.minimum(
        reaches.within(base, reach.base),
        reaches.within(size, known, least=base),
    )
    proposal = Proposal(
        scale=scale,
        newton=newton,
        momentum=factor * momentum,
        base_length=base,
        newton_length=size,
        slope=schedule * (scale * seen.slope - jnp.sum(seen.inside * newton)),
        proved=proved,
        bounded=use & (share < 1),
        bold=use & (scale > 0) & (fresh | (proved < 1)),
    )
    return proposal, rate._replace(reach=reach._replace(brake=brake))


def settle(
    state: CurvatureState,
    proposal: Proposal,
    schedule: Array,
    trial: reaches.Fit | None = None,
) -> CurvatureState:
    """Returns the state after a step, of which a trial may have left a share only."""
    rate, scale, momentum = state.rate, proposal.scale, proposal.momentum
    base, newton = proposal.base_length, proposal.newton_length
    bounded, refused = proposal.bounded, jnp.zeros((), bool)
    if trial is not None:
        refused = trial.refused
        bounded |= trial.shortened
        scale, momentum = trial.share * scale, trial.share * momentum
        base, newton = trial.share * base, trial.share * newton
    if state.config.rule.measures:
        reach = rate.reach
        again = bounded & reach.bounded & (reach.brake == 1)
        down = (again | refused) & (scale > 0)
        if trial is not None:
            reach = reaches.tried(reach, trial, proposal.bold)
        rate = rate._replace(
            scale=jnp.where(down, scale / reach.brake, rate.scale),
            taken=schedule * scale,
            reach=reaches.moved(reach, base, newton, bounded),
        )
    state = _travel(state, schedule * jnp.sqrt(base**2 + newton**2))
    return state._replace(momentum=momentum, base_scaling=scale, rate=rate)


def _travel(state: CurvatureState, length: Array) -> CurvatureState:
    """Adds the length of an update to the paths since the anchors."""

    def longer(anchor: Anchor) -> Anchor:
        return anchor._replace(path=anchor.path + length)

    sweep = state.sweep
    if sweep is not None:
        sweep = sweep._replace(start=longer(sweep.start))
    return state._replace(anchor=longer(state.anchor), sweep=sweep)


def _shortening(own: Array, size: Array, complement: Array, base: Array) -> Array:
    """Returns the factor that keeps the Newton part within the base's own reach.

    The base turns a gradient of norm |g2| into a step of norm s |d|. The Newton part
    may be as long as that, or as long as the base would make it of u in place of g2,
    whichever is longer; the second lets the subspace go on when the complement has
    converged first. A base that does not move at all sets no bound here.
    """
    bounded = (complement > _VANISHED * size) & (base > 0) & (own > 0)
    base *= jnp.maximum(1.0, size / jnp.where(bounded, complement, 1.0))
    factor = jnp.minimum(1.0, base / jnp.where(own > 0, own, 1.0))
    return jnp.where(bounded, factor, 1.0)


def norm(x: Array) -> Array:
    """Returns the norm of a few numbers, of which no square overflows: `()`."""
    largest = jnp.max(jnp.abs(x))
    usable = (largest > 0) & jnp.isfinite(largest)
    unit = x / jnp.where(usable, largest, 1.0)
    return jnp.where(usable, largest * jnp.sqrt(jnp.sum(unit**2)), largest)
