# SPDX-License-Identifier: Apache-2.0
"""The staggered refresh: a recursion whose products are made one a step.

A sweep begins by keeping the parameters as its anchor, takes in one product H v in each
of the following steps, all at the anchor, and is put to use in the step after the last;
training goes on with the previous subspace meanwhile. All of it is in the state.

A step makes one product at most. Every tenth (fewer in long runs, and every second
while no sweep is under way early on) goes to the curvature along the last step, which
the rate needs: a product too, of another vector at another point. What a step's product
is of is therefore a function of the state alone (`turn` and `question`), and whoever
makes it, `update` or `staggered_value_and_grad`, need not know what for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import lanczos, linalg, schedules
from dho2_jax._refresh import at_once
from dho2_jax._refresh.products import products_at
from dho2_jax._state.states import (
    CurvatureState,
    Probe,
    SweepState,
    drift,
    is_active,
    layout_of_state,
)
from dho2_jax._types import Array, Inner, Params
from dho2_jax._vectors import layouts, slices
from dho2_jax._vectors.layouts import Packed

NOTHING, ROW, PROBE = 0, 1, 2
"""What a step's product is for."""


class CurvatureProduct(NamedTuple):
    """H v for one step, from `staggered_value_and_grad`; opaque."""

    vector: Packed  # in slices; zero where no product was due
    count: Array  # (), int32: updates done when it was asked for


def turn(state: CurvatureState) -> Array:
    """Returns what this step's product is for: `()`, int32."""
    sweep, rate = _sweep_of(state), state.rate
    m = sweep.lanczos.betas.shape[0]
    kind = jnp.where(sweep.lanczos.index < m, ROW, NOTHING)
    rule = state.config.rule
    if rule.measures:
        due = (rate.probed == 0) | rule.wants_probe(rate, often=kind == NOTHING)
        due &= (rate.steps > 0) & jnp.any(is_active(state))
        # What this step puts to use would change the vector.
        due &= sweep.lanczos.index != m
        # As a refresh before this step has: it takes the last step off the new one.
        due &= state.counters.attempted_at != state.count
        kind = jnp.where(due, PROBE, kind)
    return jnp.where(state.enabled, kind, NOTHING)


def question(
    state: CurvatureState, leaves: list[Array], kind: Array
) -> tuple[list[Array], Packed]:
    """Returns the point, like the parameters, and the vector of this step's product.

    Args:
      state: Before the step.
      leaves: The parameters, from `layouts.match`.
      kind: From `turn`.
    """
    sweep = _sweep_of(state)
    vector = sweep.lanczos.vector
    if state.config.rule.measures:
        # |d|^2 is known, and d off the subspace already: no reduction is needed.
        length = state.rate.length
        scale = jax.lax.rsqrt(jnp.where(length > 0, length, 1.0))
        vector = jax.tree.map(
            lambda d, v: jnp.where(kind == PROBE, scale * d, v),
            state.rate.direction,
            vector,
        )
    layout = layout_of_state(state)
    dtypes = [leaves[i].dtype for i in layout.inside]
    anchor = dict(zip(layout.inside, slices.gather(sweep.anchor, dtypes), strict=True))
    anchor |= dict(zip(layout.outside, sweep.outside.leaves, strict=True))
    point = [jnp.where(kind == PROBE, x, anchor[i]) for i, x in enumerate(leaves)]
    return point, vector


def make_product(
    state: CurvatureState, params: Params, value_fn, matvec_fn
) -> CurvatureProduct:
    """Returns this step's product, made from what `update` was given."""
    layout, config = layout_of_state(state), state.config
    kind = turn(state)
    leaves, rebuild = layouts.match(params, layout)
    leaves = [jnp.asarray(x) for x in leaves]

    def make(state: CurvatureState) -> Packed:
        point, vector = question(state, leaves, kind)
        _, products = products_at(config, layout, rebuild(point), value_fn, matvec_fn)
        return products.matvec()(vector)

    vector = jax.lax.cond(
        kind != NOTHING, make, lambda _: slices.new_zeros(layout), state
    )
    return CurvatureProduct(vector, state.count)


def advance(
    state: CurvatureState, params: Params, product: CurvatureProduct
) -> tuple[CurvatureState, Probe]:
    """Takes in this step's product, if it is this step's; and begins and ends sweeps.

    Returns:
      The state, and what was measured along the last step.
    """
    if not isinstance(product, CurvatureProduct):
        raise ValueError(
            "`product` must be what staggered_value_and_grad returned, got "
            f"{type(product).__name__}; pass the last of its three results."
        )
    layout = layout_of_state(state)
    leaves, _ = layouts.match(params, layout)
    leaves = [jnp.asarray(x) for x in leaves]
    part = [leaves[i] for i in layout.inside]
    kind = jnp.where(product.count == state.count, turn(state), NOTHING)

    bend = jnp.zeros((), jnp.float32)
    if state.config.rule.measures:
        bend = jax.lax.cond(
            kind == PROBE,
            lambda rate, hd: slices.on_slices(layout, _bend, rate, hd),
            lambda rate, hd: jnp.zeros((), jnp.float32),
            state.rate,
            product.vector,
        )
    sweep = _sweep_of(state)
    run = jax.lax.cond(
        kind == ROW,
        lambda run, hv: slices.on_slices(layout, _step, run, hv),
        lambda run, hv: run,
        sweep.lanczos,
        product.vector,
    )
    state = state._replace(sweep=sweep._replace(lanczos=run))
    # In a later step than the last product's, so that no step does both.
    complete = sweep.lanczos.index == run.betas.shape[0]
    state = jax.lax.cond(
        complete & state.enabled, lambda s: _finish(s, part), lambda s: s, state
    )
    state = jax.lax.cond(
        _begins(state), lambda s: _begin(s, leaves), lambda s: s, state
    )
    return state, Probe(kind == PROBE, bend)


def _begins(state: CurvatureState) -> Array:
    """Returns whether a sweep begins in this step."""
    schedule, sweep = state.config.schedule, _sweep_of(state)
    due = schedules.is_due(schedule, state.count)
    if schedule.max_drift is not None:
        # In between, where it is over before the next one is due: till then the loop
        # keeps its curvature batch.
        idle = sweep.lanczos.index > sweep.lanczos.betas.shape[0]
        fits = schedules.fits(schedule, state.count)
        due |= idle & fits & (drift(state) > schedule.max_drift)
    return due & state.enabled


def _begin(state: CurvatureState, leaves: list[Array]) -> CurvatureState:
    """Starts a sweep; one still under way is given up and counts as rejected."""
    sweep, counters = _sweep_of(state), state.counters
    layout = layout_of_state(state)
    part = [leaves[i] for i in layout.inside]
    m = sweep.lanczos.betas.shape[0]
    given_up = sweep.lanczos.index < m
    counters = counters._replace(
        rejected=counters.rejected + given_up.astype(jnp.int32)
    )
    state = state._replace(counters=counters)
    vector = at_once.start_vector(state.config, layout, at_once.attempts(state))

    def start(inner: Inner, vector: Packed) -> lanczos.LanczosState:
        return lanczos.start(vector, m, inner, in_range=True)

    anchor = linalg.as_float32(slices.scatter(layout, part))
    sweep = SweepState(
        lanczos=slices.on_slices(layout, start, vector),
        anchor=anchor,
        outside=layouts.Outside(tuple(leaves[i] for i in layout.outside), layout),
        start=at_once.anchor_at(state, part),
    )
    return state._replace(sweep=sweep)


def _finish(state: CurvatureState, part: list[Array]) -> CurvatureState:
    """Puts a complete sweep to use, or rejects it."""
    sweep, config = _sweep_of(state), state.config
    found = at_once.read_out(config, layout_of_state(state), sweep.lanczos)
    return at_once.install(state, found, sweep.start, at_once.rounding(part))


def _step(
    inner: Inner, run: lanczos.LanczosState, product: Packed
) -> lanczos.LanczosState:
    return lanczos.step(run, product, inner)


def _bend(inner: Inner, rate: Any, product: Packed) -> Array:
    """Returns |d . H d| / |d|^2 from H d / |d|."""
    length = rate.length
    scale = jax.lax.rsqrt(jnp.where(length > 0, length, 1.0))
    return jnp.abs(scale * linalg.vdot(rate.direction, product, inner))


def _sweep_of(state: CurvatureState) -> SweepState:
    assert state.sweep is not None
    return state.sweep
