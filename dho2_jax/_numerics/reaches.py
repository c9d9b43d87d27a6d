# SPDX-License-Identifier: Apache-2.0
r"""How far a step may go: little farther than what the last ones proved safe.

The rate s is read along the base's direction d, as a ratio. While d shrinks, s grows;
when d jumps back to a length of before, s d is a leap that no reading has seen. So it
is a step's *length* that is bounded. Up to third order a step of length r changes the
loss by a r + h r^2 / 2, with the slope a and the curvature h along it. Of a step of
length R that did no harm it is known that h R is of the size of a. One that is G times
as long adds h R^2 (G^2 - 1) / 2 to that: with G = 1.2 less than a quarter of what the
last step was allowed, and the guard, which sees a mistake within two or three steps, is
in time. A length, unlike a rate, stays what it is when the loss changes its scale.

**Proved safe** are the longest of the last steps (fading by 0.9 a step: a run leaves
the region where that was so), and what a probe measured: s |d| of the direction that it
was of, for as much of s as the rule then aims at. The part in the subspace has a reach
of its own, and may always be as long as the base's part.

**Set down.** A single step that is bounded was one odd gradient. One after another,
they are of a d of another length, and s is set down to what was taken.

**Tried.** With a loss at hand a *bold* step is tried on it (`fit`): the first one after
a refresh, and one that is longer than the last ones by more than G. It may then be four
times as long, if it ends no higher than the loss was at the last trials.

**Uphill.** Momentum may carry a run uphill for 1 / (1 - mu) steps. Each such step in a
row is half as long as the one before (down to a sixteenth, since a base may have its
reasons, such as weight decay): together not much more than one step, while the base's
momentum decays as ever. O'Donoghue and Candes (2015) restart momentum there, which
needs to know the base.

**At infinity.** A loss like exp(-r / tau), as that of labels which are already told
apart, has its minimum at infinity. A step to the bottom of the parabola is tau long
there, at every step, for ever: the loss falls to rounding, and the network becomes sure
of everything. Gradient descent, whose steps shrink with the gradient, gets there with
log(steps) only (Soudry et al. 2018). What tells that from a minimum that is somewhere
is that curvature itself vanishes, while |lambda| of a regression or of a differential
equation stays. So where the largest |lambda| is below a quarter of what it once was,
the rate aims no farther than the same share of the longest step (`refreshed`). Both
maxima fade by 0.02 a refresh.

A length whose square overflows is infinite, and a step of that length is not taken.
"""

from typing import NamedTuple

import jax.numpy as jnp

from dho2_jax._types import Array

_GROWTH = 1.2  # of a step's length over the reach: G
_BOLD = 4.0  # the same where the step is tried on the loss
_FADING = 0.9  # of the reach, a step
_BRAKE = 0.5  # of the length of one uphill step after another
_SLOWEST = 1 / 16  # share of the step that is left of it
_LOST = 0.25  # rise of the loss, over the loss, at which a step is refused
_SHORTEST = 1 / 64  # share that is then left of it at least
_MEMORY = 0.8  # of the loss at the last trials
_VANISHING = 0.25  # share of the largest |lambda| below which curvature vanishes
_FORGETTING = 0.98  # of what it was, and of the longest step, a refresh


class Reach(NamedTuple):
    """What is proved safe; float32 scalars unless said. 0: nothing is yet, or none."""

    base: Array  # length of the base's part, s |d|, as taken
    measured: Array  # the same, as a probe found that it could be
    newton: Array  # length of the part in the subspace
    peak: Array  # the largest |lambda| of the subspaces so far, fading
    longest: Array  # `base` at the refreshes so far, fading
    limit: Array  # of the length that the rate aims at
    brake: Array  # share of the base's part that was taken, going uphill
    level: Array  # of the loss at the last trials
    bounded: Array  # bool: whether the last step was
    bounds: Array  # int32: how many steps were
    trials: Array  # int32: how many were tried on the loss
    refusals: Array  # int32: how many of these the loss refused


class Fit(NamedTuple):
    """What a trial says of a step."""

    share: Array  # of it that may be taken, (), float32
    level: Array  # of the loss from now on, (), float32
    shortened: Array  # (), bool: to what is proved safe
    refused: Array  # (), bool: the loss would rise too far


def start() -> Reach:
    """Returns the reach before any step."""

    def zero(dtype=jnp.float32):
        return jnp.zeros((), dtype)

    return Reach(
        base=zero(),
        measured=zero(),
        newton=zero(),
        peak=zero(),
        longest=zero(),
        limit=zero(),
        brake=jnp.ones((), jnp.float32),
        level=zero(),
        bounded=zero(bool),
        bounds=zero(jnp.int32),
        trials=zero(jnp.int32),
        refusals=zero(jnp.int32),
    )


def cut(reach: Reach, alarm: Array) -> Reach:
    """Returns the reach after the rate's guard; what it cut was not safe."""
    return reach._replace(
        base=jnp.where(alarm, 0.5 * reach.base, reach.base),
        measured=jnp.where(alarm, 0.0, reach.measured),
    )


def refreshed(reach: Reach, largest: Array, fresh: Array) -> Reach:
    """Returns the reach with the largest |lambda| of the subspace, if it is `fresh`."""
    fresh &= jnp.isfinite(largest) & (largest > 0)
    peak = jnp.maximum(largest, _FORGETTING * reach.peak)
    longest = jnp.maximum(reach.base, _FORGETTING * reach.longest)
    share = largest / jnp.where(fresh, _VANISHING * peak, 1.0)
    limit = jnp.where(share < 1, share * longest, 0.0)
    return reach._replace(
        peak=jnp.where(fresh, peak, reach.peak),
        longest=jnp.where(fresh, longest, reach.longest),
        limit=jnp.where(fresh, limit, reach.limit),
    )


def within(
    length: Array, proved: Array, tried: bool = False, least: Array | float = 0.0
) -> Array:
    """Returns the share of a step that may be taken: `()`, float32, in [0, 1].

    Args:
      length: Of the step; infinite if its square overflows.
      proved: What is proved safe; 0 bounds nothing but what is infinite.
      tried: Whether a bold step will be tried on the loss. Static.
      least: As long as this it may be in any case, where anything is proved.
    """
    limit = jnp.maximum((_BOLD if tried else _GROWTH) * proved, least)
    share = jnp.minimum(1.0, limit / jnp.where(length > 0, length, 1.0))
    share = jnp.where((length > 0) & (proved > 0), share, 1.0)
    return jnp.where(jnp.isfinite(length), share, 0.0)


def braked(reach: Reach, uphill: Array) -> Array:
    """Returns the share of the base's part that is taken when it goes `uphill`."""
    return jnp.where(uphill, jnp.maximum(_BRAKE * reach.brake, _SLOWEST), 1.0)


def fit(reach: Reach, before: Array, after: Array, slope: Array, proved: Array) -> Fit:
    """Decides on a step that was tried.

    It goes farther than what is proved safe only to where the loss is no higher than at
    the last trials: to fall from where the last step has led is not enough. Within
    that, the loss may rise by a quarter, since the trial may be on other examples than
    the gradient is of, and near a minimum the loss is rounding. Beyond, the step is
    shortened to the minimum of the parabola through both values with the slope (Nocedal
    and Wright 2006, eq. 3.57), and at least so far that by the parabola without a slope
    the loss rises by a quarter: the slope may be what is wrong.

    Args:
      reach: Before the step.
      before: The loss, `()`.
      after: The loss after the whole step.
      slope: g . u of the step u.
      proved: Share of the step that is proved safe.
    """
    known = jnp.isfinite(before)
    level = jnp.where(reach.trials > 0, jnp.minimum(reach.level, before), before)
    shortened = (proved < 1) & ~(after <= level)
    rise, allowed = after - before, _LOST * jnp.abs(before)
    refused = known & ~(rise <= allowed)
    bend = 2 * (rise - slope)
    lowest = -slope / jnp.where(bend > 0, bend, 1.0)
    flat = jnp.sqrt(allowed / jnp.where(refused & (rise > 0), rise, 1.0))
    lowest = jnp.where(jnp.isfinite(rise), jnp.minimum(lowest, flat), 0.0)
    share = jnp.where(shortened, proved, 1.0)
    share = jnp.where(
        refused, jnp.minimum(share, jnp.clip(lowest, _SHORTEST, 0.5)), share
    )
    new = jnp.where(refused, before, jnp.minimum(before, after))
    old = jnp.where(reach.trials > 0, level, new)
    level = jnp.where(known, _MEMORY * old + (1 - _MEMORY) * new, reach.level)
    return Fit(share, level, shortened, refused)


def moved(reach: Reach, base: Array, newton: Array, bounded: Array) -> Reach:
    """Returns the reach after a step with parts of these lengths.

    One of no length says nothing, and a braked one nothing of how far a step may go.
    """
    told = (base > 0) & (reach.brake == 1)

    def faded(proved: Array, length: Array, told: Array) -> Array:
        return jnp.where(told, jnp.maximum(_FADING * proved, length), proved)

    return reach._replace(
        base=faded(reach.base, base, told),
        measured=faded(reach.measured, jnp.zeros_like(base), told),
        newton=faded(reach.newton, newton, newton > 0),
        bounded=bounded,
        bounds=reach.bounds + bounded.astype(jnp.int32),
    )


def tried(reach: Reach, trial: Fit, bold: Array) -> Reach:
    """Returns the reach with a trial counted, if there was one."""
    return reach._replace(
        level=jnp.where(bold, trial.level, reach.level),
        trials=reach.trials + bold.astype(jnp.int32),
        refusals=reach.refusals + (bold & trial.refused).astype(jnp.int32),
    )
