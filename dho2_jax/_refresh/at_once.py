# SPDX-License-Identifier: Apache-2.0
"""The refresh: from a loss and a point to a new subspace, accepted or rejected."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_jax._numerics import lanczos, linalg, ritz, schedules, subspaces
from dho2_jax._refresh.products import Products, check_one_source, products_at
from dho2_jax._state.config import Config
from dho2_jax._state.states import (
    Anchor,
    CurvatureState,
    SweepState,
    active_slots,
    drift,
    layout_of_state,
    replace,
)
from dho2_jax._types import Array, Inner, MatVec, Params, PyTree, ValueFn
from dho2_jax._vectors import axes, layouts, slices

_DEFECT = 1e-2  # the largest recurrence defect of a refresh in float32


def refresh(
    state: PyTree,
    params: Params,
    value_fn: ValueFn | None = None,
    *,
    matvec_fn: Callable[[Params], MatVec] | None = None,
    where: str | None = None,
) -> PyTree:
    r"""Computes the subspace anew at `params`; pure and jittable.

    m Lanczos steps on the curvature (one product each, and one more that starts the
    recursion in the range of the curvature, so that a coordinate without gradient and
    without curvature is never moved), the extreme Ritz pairs, and $u \leftarrow V_{new}
    V_{old}^\top u$ for the momentum. A refresh that is not finite, not orthonormal, not
    self-consistent or finds nothing is rejected: the old subspace stays, and `metrics`
    counts it. With a curvature-set rate that `update` could not probe, it is probed
    here. A staggered sweep that is under way is given up.

    Args:
      state: Any nest of Optax states that holds DHO² states.
      params: The whole parameters, as `value_fn` takes them.
      value_fn: `params -> ()`, the loss on the curvature batch; for curvature="ggn" the
        pair `(outputs_fn, loss_fn)`.
      matvec_fn: Instead of it, `params -> matvec`, your own curvature product.
      where: Which of several states, see `metrics`; None: all, one after the other.

    Returns:
      The state with a new subspace, of unchanged structure, shapes and dtypes.

    Raises:
      ValueError: If neither or both functions are given, the parameters are empty or
        not those of `init`, the loss is not a real scalar, or it cannot be
        differentiated as `curvature=` asks.
    """

    def change(ours: CurvatureState) -> CurvatureState:
        check_one_source(value_fn, matvec_fn, "refresh")
        part, products = products_at(
            ours.config, layout_of_state(ours), params, value_fn, matvec_fn
        )
        return refreshed(ours, part, products)

    return replace(state, change, where)


def maybe_refresh(
    state: CurvatureState, part: tuple[Array, ...], products: Products
) -> CurvatureState:
    """Refreshes when the period is full or the parameters have drifted too far."""
    config, schedule = state.config, state.config.schedule
    due = schedules.is_due(schedule, state.count)
    if schedule.max_drift is not None:
        # Not at once again where the last one was rejected.
        rested = state.count - state.counters.attempted_at >= config.num_matvecs
        rested &= state.count > schedule.warmup_steps
        due |= rested & (drift(state) > schedule.max_drift)
    # The identity is `false_fun`: XLA elides the copies of branch 0 only, so that an
    # untaken refresh costs nothing (https://github.com/jax-ml/jax/issues/5986).
    return jax.lax.cond(
        due & state.enabled,
        lambda s: refreshed(s, part, products),
        lambda s: s,
        state,
    )


def refreshed(
    state: CurvatureState, part: tuple[Array, ...], products: Products
) -> CurvatureState:
    """Returns the state after one refresh at the parameters `part`."""
    found = compute_subspace(
        state.config, layout_of_state(state), products.matvec(), attempts(state)
    )
    state = install(state, found, anchor_at(state, part), rounding(part))
    return state._replace(rate=_probe_if_unprobed(state, products))


class Found(NamedTuple):
    """What a finished recursion found, before it is accepted."""

    subspace: subspaces.Subspace
    recurrence_defect: Array  # (), float32
    scale: Array  # (), float32: of the operator


def compute_subspace(
    config: Config, layout: layouts.Layout, matvec: MatVec, attempt: Array
) -> Found:
    """Returns a new subspace, all of its products made here and now."""
    on_slices = functools.partial(slices.on_slices, layout)

    def product(v: layouts.Flat) -> layouts.Flat:
        v = matvec(on_slices(lambda _, v: slices.unflatten(v), v))
        return on_slices(lambda _, v: slices.flatten(v), v)

    run = lanczos.run(
        product,
        on_slices(
            lambda _, v: slices.flatten(v), start_vector(config, layout, attempt)
        ),
        min(config.num_matvecs, layout.size),
        on_slices,
        in_range=True,
    )
    return read_out(config, layout, run)


def start_vector(
    config: Config, layout: layouts.Layout, attempt: Array
) -> layouts.Packed:
    """Returns the vector that a recursion starts from, another in each attempt."""
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), attempt)
    bits = jax.random.bits(key, (len(layout.stored),), jnp.uint32)
    return slices.cut(layouts.noise(layout, bits))


def read_out(
    config: Config, layout: layouts.Layout, run: lanczos.LanczosState
) -> Found:
    """Returns the Ritz pairs of a finished recursion on `Flat` or `Packed` vectors."""
    alphas, betas = lanczos.tridiagonal(run)
    pairs = ritz.ritz_pairs(alphas, betas, config.num_largest, config.num_smallest)

    def rotated(_, weights, basis):
        rows = linalg.rotate(weights, basis)
        return slices.unflatten(rows) if isinstance(rows, layouts.Flat) else rows

    vectors = slices.on_slices(layout, rotated, pairs.weights, run.basis)
    new = subspaces.Subspace(
        eigenvalues=pairs.eigenvalues,
        eigenvectors=vectors,
        valid=pairs.valid,
        next_eigenvalue=pairs.next_eigenvalue,
        residuals=pairs.residuals,
    )
    scale = jnp.max(jnp.abs(alphas)) + 2 * jnp.max(betas)
    return Found(new, lanczos.recurrence_defect(run), scale)


def install(
    state: CurvatureState, found: Found, anchor: Anchor, rounding: float
) -> CurvatureState:
    """Returns the state with the new subspace in use, or with a rejection counted.

    The momentum is carried along, and the rate's direction taken off the new subspace.

    Args:
      state: Before.
      found: What a recursion found.
      anchor: Where it was measured.
      rounding: Of the products; see `rounding`.
    """
    old, counters, rate = state.subspace, state.counters, state.rate
    new, defect, scale = found
    usable, change, along = slices.on_slices(
        layout_of_state(state),
        _compare,
        new,
        old,
        scale,
        state.config.rule.direction(rate),
        active_slots(state.config, new, state.enabled),
    )
    accept = usable & (defect <= max(_DEFECT, 4 * rounding))
    moved = linalg.matmul(change, state.momentum)

    def choose(a, b):
        return jax.tree.map(lambda x, y: jnp.where(accept, x, y), a, b)

    return state._replace(
        subspace=choose(new, old),
        momentum=choose(moved, state.momentum),
        counters=counters._replace(
            refreshes=counters.refreshes + accept.astype(jnp.int32),
            rejected=counters.rejected + (~accept).astype(jnp.int32),
            attempted_at=state.count,
            recurrence_defect=defect,
        ),
        anchor=choose(anchor, state.anchor),
        rate=choose(rate._replace(**along), rate),
        sweep=None if state.sweep is None else _given_up(state.sweep),
    )


def _given_up(sweep: SweepState) -> SweepState:
    """Returns no sweep under way: it is at its end, or what it finds is outdated."""
    run = sweep.lanczos
    none = jnp.full_like(run.index, run.betas.shape[0] + 1)
    return sweep._replace(lanczos=run._replace(index=none))


def outside(
    layout: layouts.Layout,
    x: layouts.Packed,
    subspace: subspaces.Subspace,
    active: Array,
) -> layouts.Packed:
    """Returns what of a vector is off a subspace."""
    return slices.on_slices(
        layout,
        lambda inner, x, rows, on: subspaces.project_out(x, rows, on, inner),
        x,
        subspace.eigenvectors,
        active,
    )


def attempts(state: CurvatureState) -> Array:
    """Returns the number of refreshes so far, rejected ones included."""
    return state.counters.refreshes + state.counters.rejected


def rounding(part: Sequence[Array]) -> float:
    """Returns that of the coarsest dtype: no product is more symmetric than that."""
    return max(float(jnp.finfo(x.dtype).eps) for x in part)


def anchor_at(state: CurvatureState, part: Sequence[Array]) -> Anchor:
    """Returns the anchor of curvature that is measured at the parameters `part`."""
    norm = linalg.norm(tuple(part))
    names = state.config.axis_name
    return Anchor(
        count=state.count,
        norm=axes.agreed(norm, names) if names else norm,
        path=jnp.zeros((), jnp.float32),
    )


def _compare(
    inner: Inner,
    new: subspaces.Subspace,
    old: subspaces.Subspace,
    scale: Array,
    direction: layouts.Packed | None,
    active: Array,
) -> tuple[Array, Array, dict[str, Any]]:
    """Returns whether `new` may be used, V_new V_old^T, and the last direction.

    The direction is taken off the new subspace, so that its curvature is that of the
    complement from here on. What reads the old rows decides over acceptance, so that it
    comes before the choice: XLA can then make the choice in place, and an untaken
    refresh copies nothing.
    """
    usable = subspaces.is_acceptable(new, scale, inner)
    change = subspaces.change_of_basis(old, new, inner)
    usable &= jnp.all(jnp.isfinite(change))
    if direction is None:
        return usable, change, {}
    direction = subspaces.project_out(direction, new.eigenvectors, active, inner)
    length = linalg.vdot(direction, direction, inner)
    usable &= jnp.isfinite(length)
    return usable, change, {"direction": direction, "length": length}


def _probe_if_unprobed(state: CurvatureState, products: Products) -> Any:
    """Probes the rate here when `update` had no loss to do it with."""
    rule = state.config.rule
    if not rule.measures:
        return state.rate

    def measure(rate: Any) -> Any:
        unlimited = jnp.full((), jnp.inf, jnp.float32)  # the next step caps
        return rule.later_probe(rate, *products.bend(rate.direction), unlimited)

    return jax.lax.cond(rule.is_unprobed(state.rate), measure, lambda r: r, state.rate)
