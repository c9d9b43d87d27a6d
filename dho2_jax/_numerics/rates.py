# SPDX-License-Identifier: Apache-2.0
"""The base rate set by curvature, with a guard.

Along the base's own step d the loss is, on average, a parabola: with the slope a at the
start of the step and the curvature h = d . H d, the scale that minimises it is
s* = -a / h. Both are averages of noisy readings:

    slope       c_i = g_i . d_{i-1}, the fresh gradient along the previous direction,
                which that direction has not seen; read every step for one dot product.
                It belongs to the end of the step, so a = mean(c) - s h. The slope of
                the gradient that made the step is flattered by its own noise; where
                there is none it is exact, and the loss need not be a parabola: of
                both, the one that promises less counts.
    curvature   h = |d . H d|, probed every two steps at first, then every ten; in long
                runs every 20 from step 2000 on, and every 50 from step 5000 on.

The scale s first aims at s*, and later at 1.5 s*, since the best of each single step is
short-sighted: with noisy gradients it lets s decay too early (short-horizon bias, Wu et
al. 2018), and with exact ones any share of s* below 2 descends, some beyond 1 faster
(relaxed steepest descent, Raydan and Svaiter 2002). Once the guard has acted, s goes
beyond s* no further than half of where it did. It grows fast and shrinks slowly (no
faster than 1 / sqrt(steps)): where gradient noise dominates, s* reads about s / 2 for
every s, and following it down would send s to zero. Only when steps raise the loss
(s > 3 s*), or grow in length, does it fall by up to a half at a probe. In the first
steps, until the guard first acts, s may double at a probe, or grow fourfold up to a
quarter of s*; after that, double to a quarter of s*.

The guard halves s at once when a slope is eight mean deviations above its mean, which
is how a sharp direction that leaked out of the subspace first shows. Both are of the
last ten steps or so: slopes fall by orders of magnitude in a run, and against the mean
of a hundred steps a leak would not stand out before it has done its damage. In the
first steps, when such means mislead, the guard also acts on a slope that the curvature
seen so far cannot explain. Both only where a shorter step would have been better: the
step went up the loss by more than it went down (by the slopes at its two ends), and the
slope is still rising. Momentum that points uphill, or a cut that needs a few steps to
show, would else be cut again and again, until s is nothing.

A reading counts by the squared length of its d, but an old one never by more than the
memory of the average allows: neither do old readings outweigh new ones when gradients
shrink by orders of magnitude, nor is a direction that grows averaged away. All
quantities are relative to the base's own update, so any base serves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import reaches
from dho2_jax._types import Array

EARLY_STEPS = 40
EARLY_PERIOD = 2
PROBE_PERIOD = 10
# From which step on, the period: a hundredth of the steps so far, by when curvature and
# the scale that it sets have slowed down as much.
_LATER = ((2000, 20), (5000, 50))
_REACH = 1.5  # share of s* that s aims at after the early steps
_FIRST = 0.1  # share of s* taken on the first step, from one batch
_AVERAGE = 0.8  # memory of the averages of a and h
_MEMORY = 0.9  # memory of the guard's statistics
_DEVIATIONS = 8.0
_SETTLED = 10  # slopes seen before the guard trusts its statistics
_LEAP = 0.25  # share of s* that s may leap to in the early steps, or double to once cut
_LONGEST = 4.0  # leap, a factor
_FAR = 16.0  # how many times s may lie below its aim before s grows fast at any time
_SMALLEST = 1e-12


class RateState(NamedTuple):
    """What the rule remembers; float32 scalars unless said."""

    scale: Array  # s, multiplies the base's update
    direction: Any  # d of the last step off the subspace, float32
    length: Array  # |d|^2 of that
    taken: Array  # s times the schedule, as the last step applied it
    steps: Array  # int32: steps taken under the rule
    probed: Array  # int32: value of `steps` at the last probe
    slope_sum: Array  # sum of c since the last probe
    ahead_sum: Array  # sum of g . d of the same steps, at their starts
    length_sum: Array  # sum of |d|^2 since then
    slope_count: Array  # of how many steps
    slope_mean: Array  # the guard's running mean of c
    slope_deviation: Array  # and mean deviation
    descent: Array  # average of -a / |d|^2
    bend: Array  # average of h / |d|^2
    weight: Array  # of these averages, in units of |d|^2
    before_cut: Array  # s before the guard's last cut
    cuts: Array  # int32: how often the guard acted
    ahead: Array  # g . d of the last step, at its start
    slope: Array  # c of the step before
    reach: reaches.Reach


def start(direction: Any) -> RateState:
    """Returns the rule before its first step: the base's own rate, s = 1."""

    def zero():
        return jnp.zeros((), jnp.float32)

    def none():
        return jnp.zeros((), jnp.int32)

    return RateState(
        scale=jnp.ones((), jnp.float32),
        direction=direction,
        length=zero(),
        taken=zero(),
        steps=none(),
        probed=none(),
        slope_sum=zero(),
        ahead_sum=zero(),
        length_sum=zero(),
        slope_count=zero(),
        slope_mean=zero(),
        slope_deviation=zero(),
        descent=zero(),
        bend=zero(),
        weight=zero(),
        before_cut=zero(),
        cuts=none(),
        ahead=zero(),
        slope=zero(),
        reach=reaches.start(),
    )


def observe(
    rate: RateState, slope: Array, comparable: Array | bool = True
) -> RateState:
    """Takes in c = g . d of the last step; halves s when it stands out.

    Right after a refresh c is not `comparable` with earlier ones: another subspace has
    been taken off the gradient.

    A slope that is not finite stands out too; one along a direction of no length is
    none.
    """
    told = rate.length > 0
    seen = rate.steps  # slopes so far, plus one: the first step has none before it
    first = seen <= 1
    memory = jnp.minimum(_MEMORY, 1 - 1 / jnp.maximum(seen, 1).astype(jnp.float32))
    limit = rate.slope_mean + _DEVIATIONS * rate.slope_deviation
    # With curvature h the slope after a step of scale s is below s h, however long.
    uphill = jnp.maximum(rate.ahead, 0.0)
    steep = (rate.bend > 0) & ~(slope <= uphill + rate.taken * rate.bend * rate.length)
    alarm = (seen > _SETTLED) & ~(slope <= limit) | (seen < EARLY_STEPS) & steep
    alarm &= ~(slope + rate.ahead <= 0)
    rising = ~(slope <= rate.slope) & (jnp.isfinite(slope) | jnp.isfinite(rate.slope))
    alarm &= comparable & rising & told

    # Winsorised: what stands out moves the statistics no further than the limit.
    low = rate.slope_mean - _DEVIATIONS * rate.slope_deviation
    kept = jnp.where(seen > _SETTLED, jnp.clip(slope, low, limit), slope)
    kept = jnp.where(jnp.isfinite(kept), kept, rate.slope_mean)
    start = jnp.where(seen > _SETTLED, jnp.minimum(rate.ahead, limit), rate.ahead)
    start = jnp.where(jnp.isfinite(start), start, rate.slope_mean)
    mean = jnp.where(first, kept, memory * rate.slope_mean + (1 - memory) * kept)
    deviation = jnp.where(
        first,
        jnp.abs(kept),
        memory * rate.slope_deviation + (1 - memory) * jnp.abs(kept - mean),
    )

    def unless_cut(x: Array) -> Array:
        return jnp.where(alarm, 0.0, x)

    new = rate._replace(
        scale=jnp.where(alarm, 0.5 * rate.scale, rate.scale),
        slope_sum=unless_cut(rate.slope_sum + kept),
        ahead_sum=unless_cut(rate.ahead_sum + start),
        length_sum=unless_cut(rate.length_sum + rate.length),
        slope_count=unless_cut(rate.slope_count + 1),
        slope_mean=mean,
        slope_deviation=deviation,
        descent=unless_cut(rate.descent),
        bend=unless_cut(rate.bend),
        weight=unless_cut(rate.weight),
        before_cut=jnp.where(
            alarm, jnp.maximum(rate.scale, rate.before_cut), rate.before_cut
        ),
        cuts=rate.cuts + alarm.astype(jnp.int32),
        slope=slope,
        reach=reaches.cut(rate.reach, alarm),
    )
    return pick(told, new, rate)


def pick(condition: Array, a: Any, b: Any) -> Any:
    """Returns one of two states of a rule."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _period(steps: Array, often: Array | bool) -> Array:
    """Returns the steps between probes, from the step count alone: `()`, int32."""
    found = jnp.where((steps < EARLY_STEPS) & often, EARLY_PERIOD, PROBE_PERIOD)
    for start, longer in _LATER:
        found = jnp.where(steps < start, found, longer)
    return found


def is_due(rate: RateState, often: Array | bool = True) -> Array:
    """Returns whether a step should probe: `()`, bool; early on more `often`."""
    return rate.steps % _period(rate.steps, often) == 0


def is_unprobed(rate: RateState) -> Array:
    """Returns whether `update` had no loss to probe with: `()`, bool."""
    return rate.slope_count >= 2 * _period(rate.steps, often=False)


def first_scale(rate: RateState, slope: Array, bend: Array) -> RateState:
    """Returns the rule after its first probe: s is at most a tenth of its s*."""
    safe = _FIRST * -slope / jnp.where(bend > 0, bend, 1.0)
    usable = (bend > 0) & (slope < 0) & jnp.isfinite(safe)
    scale = jnp.where(usable, jnp.minimum(rate.scale, safe), rate.scale)
    return _reset(rate._replace(scale=jnp.maximum(scale, _SMALLEST)))


def _reset(rate: RateState) -> RateState:
    """Returns the rule with all slopes so far forgotten, as after every probe."""
    return rate._replace(
        slope_sum=jnp.zeros_like(rate.slope_sum),
        ahead_sum=jnp.zeros_like(rate.ahead_sum),
        length_sum=jnp.zeros_like(rate.length_sum),
        slope_count=jnp.zeros_like(rate.slope_count),
        probed=rate.steps,
    )


def adjust(rate: RateState, bend: Array, length: Array, largest: Array) -> RateState:
    """Moves s towards its share of s* = -a / h after a probe of `bend` = h / |d|^2.

    Growth compares s, shrinking compares s times the schedule, so that a decay
    multiplies the rule without being fought by it. A direction of length zero says
    nothing.
    """
    taken, reach = rate.taken, rate.reach
    total = jnp.where(rate.length_sum > 0, rate.length_sum, 1.0)
    slope, start = rate.slope_sum / total, rate.ahead_sum / total
    past = jnp.minimum(_AVERAGE * rate.weight, _AVERAGE / (1 - _AVERAGE) * length)
    share = past / jnp.where(past + length > 0, past + length, 1.0)
    found = jnp.minimum(taken * bend - slope, -start)
    descent = share * rate.descent + (1 - share) * found
    bends = share * rate.bend + (1 - share) * bend
    best = descent / jnp.where(bends > 0, bends, 1.0)
    best = jnp.where(bends > 0, best, jnp.where(descent > 0, jnp.inf, rate.scale))
    early = rate.steps < EARLY_STEPS
    uncut = early & (rate.cuts == 0)
    safe = 0.5 * rate.before_cut
    edge = jnp.where(rate.cuts > 0, safe, jnp.inf)
    further = jnp.maximum(best, jnp.minimum(_REACH * best, edge))
    aim = jnp.where(early | ~(bends > 0), best, further)
    limit = reach.limit / jnp.sqrt(jnp.where(length > 0, length, 1.0))
    aim = jnp.where(limit > 0, jnp.minimum(aim, limit), aim)

    elapsed = (rate.steps - rate.probed).astype(jnp.float32)
    steps = rate.steps.astype(jnp.float32)
    fast = (
        uncut
        | early & (rate.scale < _LEAP * best)
        | (rate.scale < safe)
        | (rate.scale < aim / _FAR)
    )
    growth = jnp.where(fast, 2.0, jnp.minimum(2.0, 1.25 ** (elapsed / PROBE_PERIOD)))
    # Not on the few readings since a cut.
    leap = jnp.where(uncut, jnp.minimum(_LEAP * best, _LONGEST * rate.scale), 0.0)
    grown = jnp.minimum(aim, jnp.maximum(growth * rate.scale, leap))
    slow = jnp.sqrt(1 - elapsed / jnp.maximum(steps + elapsed, 1.0))
    diverging = (taken >= 3 * best) | (length > rate.weight)
    least = jnp.where(diverging, 0.5, slow)
    shrunk = rate.scale * jnp.maximum(aim / jnp.where(taken > 0, taken, 1.0), least)
    scale = jnp.where(
        aim > rate.scale, grown, jnp.where(aim < taken, shrunk, rate.scale)
    )
    usable = jnp.isfinite(bend) & jnp.isfinite(length)
    usable &= (length > 0) & (rate.slope_count > 0)
    scale = jnp.where(usable, scale, rate.scale)
    proved = jnp.where(usable, jnp.minimum(scale, aim) * jnp.sqrt(length), 0.0)
    return _reset(
        rate._replace(
            scale=jnp.clip(scale, _SMALLEST, jnp.maximum(largest, _SMALLEST)),
            descent=jnp.where(usable, descent, rate.descent),
            bend=jnp.where(usable, bends, rate.bend),
            weight=jnp.where(usable, past + length, rate.weight),
            reach=reach._replace(measured=jnp.maximum(reach.measured, proved)),
        )
    )
