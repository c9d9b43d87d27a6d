# SPDX-License-Identifier: Apache-2.0
r"""The mathematics of one hybrid step, without the Optax contract around it.

Symbols of FOSI (arXiv 2302.08484) and DHO² (arXiv 2505.00982) and their names here:

    g        updates                     V, lambda  Subspace.eigenvectors, .eigenvalues
    k, l     num_largest, num_smallest   lambda_+   Subspace.next_eigenvalue
    m        num_matvecs                 T          refresh_period
    alpha    newton_learning_rate        beta       subspace_decay
    delta    damping                     c          max_base_scaling
    u        CurvatureState.momentum     s          CurvatureState.base_scaling

Each step, with c0 = V g:

    1. complement  g2 = g - V^T c0;  d = base.update(g2);  d <- d - V^T V d
    2. momentum    u <- beta u + (1 - beta) c0
    3. update      s d - alpha V^T (u / (|lambda| + delta))

u lives in the span of V and is kept as its k + l coefficients. V is read four times:
for c0, for g2, for V d, and for the one combination that ends lines 1 and 3 together.

The update of a linear base (gradient descent, with or without momentum) of g2 is the
projection of its update of g. It is given g, and V is read twice: for c0 and V d, and
for the combination. Where V has changed since, the two differ: g2 of earlier steps was
off another V, while all of the base's memory of g is taken off this one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import linalg, rates, reaches, subspaces
from dho2_jax._refresh.products import Products
from dho2_jax._state.states import (
    CurvatureState,
    Probe,
    is_active,
    layout_of_state,
)
from dho2_jax._step import proposals
from dho2_jax._types import Array, Inner
from dho2_jax._vectors.layouts import Packed
from dho2_jax._vectors.slices import on_slices

_FLOOR = 0.01  # least |lambda| over the largest, under a curvature-set rate


class Hyper(NamedTuple):
    """The hyper-parameters of this step, `()` float32 each."""

    newton: Array  # alpha
    decay: Array  # beta
    damping: Array  # delta
    cap: Array  # c
    schedule: Array


class Split(NamedTuple):
    """A gradient in two parts; or, for a linear base, not yet split."""

    active: Array  # (k + l,), bool: slots that take part
    inside: Array | None  # c0 = V g, (k + l,), float32
    given: Packed  # to the base: g2 = g - V^T c0, or g; in the dtypes of g


class Measured(NamedTuple):
    """Inner products with g and the base's update d; `()` float32 but the first two."""

    inside: Array  # c0 = V g, (k + l,)
    overlap: Array  # V d, (k + l,)
    step_square: Array  # d . d
    complement_square: Array  # g2 . g2
    slope: Array | None  # g2 . d of the last step
    slope_ahead: Array | None  # g2 . d


def split(state: CurvatureState, grads: Packed, linear_base: bool = False) -> Split:
    """Splits the gradient into the subspace and its complement, if the base needs it.

    For a linear base `join` does so, in one pass with d.
    """

    def apart(inner, rows, grads, active):
        inside = subspaces.coefficients(rows, grads, active, inner)
        return Split(active, inside, subspaces.remove(grads, inside, rows))

    active = is_active(state)
    if linear_base:
        return Split(active, None, grads)
    rows = state.subspace.eigenvectors
    return on_slices(layout_of_state(state), apart, rows, grads, active)


def join(
    state: CurvatureState,
    parts: Split,
    steps: Packed,
    hyper: Hyper,
    products: Products | None,
    probe: Probe | None = None,
    *,
    tried: bool = False,
) -> tuple[Packed, proposals.Proposal, CurvatureState]:
    """Joins the base optimizer's update d with the Newton step.

    Args:
      state: Before the step.
      parts: What `split` made of the gradient.
      steps: d, the base's update of what it was given.
      hyper: The hyper-parameters.
      products: The curvature at the parameters, for the rate's probes, if there is one.
      probe: With a staggered refresh, what was measured along the last step instead.
      tried: Whether the caller tries a bold step on the loss. Static.

    Returns:
      The update, in the dtypes of d; what `settle` must know of it; and the state
      after it, but for that.
    """
    config, space, layout = state.config, state.subspace, layout_of_state(state)
    rule, rows, active = config.rule, space.eigenvectors, parts.active
    last = rule.direction(state.rate)
    if parts.inside is None:
        # Else a GPU stacks leaves of one shape within the one reduction that reads g, d
        # and V: at 1e8 numbers on an H200 2.4 ms, against 1.7 and two stacks of 0.2.
        parts, steps = linalg.together((parts, steps))
    seen = on_slices(layout, _measure, rows, parts, steps, last)
    length = jnp.sqrt(_length_outside(seen))
    inside = seen.inside
    rate, floor = state.rate, 0.0
    spread = subspaces.spread_of_largest(space.eigenvalues, active, config.num_smallest)
    if rule.measures:
        rate = _measured(state, active, steps, seen, hyper, products, probe)
        floor = _FLOOR
        # One gradient that is not finite shall not get into u.
        inside = jnp.where(jnp.all(jnp.isfinite(inside)), inside, 0.0)
    use = jnp.any(active)
    scale = jnp.where(use, rule.scale(rate, spread, hyper.cap), 1.0)
    if rule.measures and probe is not None:
        # The first step under the rule only measures: what it would be is known to the
        # next, which can then ask for the curvature along it.
        scale = jnp.where(use & (state.rate.steps == 0), 0.0, scale)
    momentum = _next_momentum(state, inside, hyper.decay)
    momentum = jnp.where(active, momentum, 0.0)
    inverse = subspaces.newton_scale(space.eigenvalues, active, hyper.damping, floor)
    newton = hyper.newton * momentum * inverse

    if not rule.measures:
        proposal = proposals.free(scale, newton, momentum, length)
        coefs = proposal.scale * seen.overlap + proposal.newton
        updates = on_slices(layout, _move, rows, coefs, steps, scale, hyper.schedule)
        return updates, proposal, state
    assert seen.slope_ahead is not None
    complement = jnp.sqrt(seen.complement_square)
    proposal, rate = proposals.bound(
        rate,
        scale,
        newton,
        momentum,
        proposals.Measures(length, seen.slope_ahead, inside, complement),
        hyper.schedule,
        use=use,
        fresh=(state.counters.attempted_at == state.count) | (state.rate.steps == 0),
        tried=tried,
    )
    scale = proposal.scale
    both = jnp.stack([scale * seen.overlap + proposal.newton, seen.overlap])
    updates, outside = on_slices(
        layout, _move_and_project, rows, both, steps, scale, hyper.schedule
    )
    return updates, proposal, state._replace(rate=rate._replace(direction=outside))


def _measure(
    inner: Inner,
    rows: Packed,
    parts: Split,
    steps: Packed,
    last: Packed | None,
) -> Measured:
    """Returns what `join` needs to know; g2 itself is not needed for any of it.

    The last direction is off V, so that g . d of it is g2 . d.
    """
    active, inside, given = parts
    steps = linalg.as_float32(steps)
    square, ahead = (linalg.vdot(given, x, inner) for x in (given, steps))
    if inside is not None:
        overlap = subspaces.coefficients(rows, steps, active, inner)
    else:
        inside, overlap = jnp.where(active, inner(rows, given, steps), 0.0)
        square = jnp.maximum(square - jnp.sum(inside**2), 0.0)
        ahead -= jnp.sum(inside * overlap)
    return Measured(
        inside=inside,
        overlap=overlap,
        step_square=linalg.vdot(steps, steps, inner),
        complement_square=square,
        slope=None if last is None else linalg.vdot(given, last, inner),
        slope_ahead=None if last is None else ahead,
    )


def _move(
    _: Inner, rows: Packed, inside: Array, steps: Packed, scale: Array, schedule: Array
) -> Packed:
    """Returns schedule * (s d - V^T inside)."""
    return _moved(steps, linalg.combine(inside, rows), scale, schedule)


def _moved(steps: Packed, inside: Packed, scale: Array, schedule: Array) -> Packed:
    return jax.tree.map(
        lambda d, v: (schedule * (scale * d.astype(jnp.float32) - v)).astype(d.dtype),
        steps,
        inside,
    )


def _move_and_project(
    _: Inner, rows: Packed, inside: Array, steps: Packed, scale: Array, schedule: Array
) -> tuple[Packed, Packed]:
    """Returns what `_move` does of inside[0], and d - V^T inside[1]; one pass over V.

    The second is what the next step's probe will be of: known here, it need not be
    taken off V there, where a product has to know its vector beforehand.
    """
    both = linalg.rotate(linalg.together(inside), rows)
    first, second = (jax.tree.map(lambda v, i=i: v[i], both) for i in (0, 1))
    moved = _moved(steps, first, scale, schedule)
    return linalg.together((moved, linalg.add_scaled(steps, -1.0, second)))


def _measured(
    state: CurvatureState,
    active: Array,
    steps: Packed,
    seen: Measured,
    hyper: Hyper,
    products: Products | None,
    probe: Probe | None,
) -> Any:
    """Returns a measuring rule after the step, but for its direction.

    It rests while no slot is active.
    """
    rule, rate = state.config.rule, state.rate
    slope, slope_ahead = seen.slope, seen.slope_ahead
    assert slope is not None and slope_ahead is not None
    use, started = jnp.any(active), rate.steps > 0
    comparable = state.counters.attempted_at != state.count
    rate = rates.pick(use & started, rule.observe(rate, slope, comparable), rate)
    largest = jnp.max(jnp.where(active, jnp.abs(state.subspace.eigenvalues), 0.0))
    fresh = use & ~comparable
    rate = rate._replace(reach=reaches.refreshed(rate.reach, largest, fresh))

    if probe is not None:
        first = rule.first_probe(rate, slope, probe.bend * rate.length)
        later = rule.later_probe(rate, probe.bend, rate.length, hyper.cap)
        rate = rates.pick(
            probe.is_due, rates.pick(rate.probed == 0, first, later), rate
        )
    elif products is not None:

        def outside(_, steps, overlap, rows):
            return subspaces.remove(linalg.as_float32(steps), overlap, rows)

        def measure(rate: Any) -> Any:
            # The previous direction has not seen this batch; the first has no other.
            along = jax.lax.cond(
                started,
                lambda last, *_: last,
                lambda _, *args: on_slices(layout_of_state(state), outside, *args),
                *(rate.direction, steps, seen.overlap, state.subspace.eigenvectors),
            )
            bend, length = products.bend(along)
            first = rule.first_probe(rate, slope_ahead, bend * length)
            later = rule.later_probe(rate, bend, length, hyper.cap)
            return rates.pick(started, later, first)

        due = use & (rule.wants_probe(rate) | ~started)
        rate = jax.lax.cond(due, measure, lambda r: r, rate)

    length = _length_outside(seen)
    return rate._replace(
        scale=jnp.minimum(rate.scale, hyper.cap),
        steps=rate.steps + use.astype(jnp.int32),
        length=jnp.where(jnp.isfinite(length), length, 0.0),
        ahead=slope_ahead,
    )


def _length_outside(seen: Measured) -> Array:
    """Returns |d - V^T V d|^2."""
    return jnp.maximum(seen.step_square - jnp.sum(seen.overlap**2), 0.0)


def _next_momentum(state: CurvatureState, inside: Array, beta: Array) -> Array:
    """Returns u after c0, by the recursion that `subspace_momentum` names."""
    kind, momentum = state.config.subspace_momentum, state.momentum
    # One gradient that was not finite shall not stay in u for ever.
    momentum = jnp.where(jnp.isfinite(momentum), momentum, 0.0)
    if kind == "heavy_ball":
        return beta * momentum + inside
    if kind == "nesterov":
        return beta**2 * momentum + (1 + beta) * inside
    return beta * momentum + (1 - beta) * inside
