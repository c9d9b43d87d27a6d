# SPDX-License-Identifier: Apache-2.0
"""The refresh: from a loss and a point to a new subspace, accepted or rejected."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dho2_jax import _lanczos as lanczos
from dho2_jax import _layout as layouts
from dho2_jax import _linalg as linalg
from dho2_jax import _rate
from dho2_jax import _slices as slices
from dho2_jax import _spectrum as spectrum
from dho2_jax import _subspace as subspaces
from dho2_jax._config import Config, check_integer, check_steps
from dho2_jax._products import Products, check_one_source, products_at
from dho2_jax._state import CurvatureState, is_active, layout_of_state, replace
from dho2_jax._types import Array, Inner, MatVec, Params, PyTree, ValueFn

_DEFECT = 1e-2  # the largest recurrence defect of a refresh in float32


def should_refresh(
    step: int,
    refresh_period: int = 200,
    warmup_steps: int = 0,
    early_refreshes: tuple[int, ...] = (),
) -> bool:
    """Tells on the host whether to refresh before a step.

    A pure function of numbers that every process knows; no device is read.

    Args:
      step: Updates done so far, a Python int.
      refresh_period: T, steps between refreshes.
      warmup_steps: Steps before the first refresh.
      early_refreshes: More steps to refresh at, counted from the first refresh.

    Returns:
      True at `warmup_steps`, `warmup_steps + T`, ..., and at the early ones.

    Raises:
      ValueError: If an argument is not an integer in its range.
    """
    check_integer("step", step, 0)
    check_integer("refresh_period", refresh_period, 1)
    check_integer("warmup_steps", warmup_steps, 0)
    early = check_steps("early_refreshes", early_refreshes)
    return _is_due(step - warmup_steps, refresh_period, early)


def refresh(
    state: PyTree,
    params: Params,
    value_fn: ValueFn | None = None,
    *,
    matvec_fn: Callable[[Params], MatVec] | None = None,
) -> PyTree:
    r"""Computes the subspace anew at `params`; pure and jittable.

    m Lanczos steps on the curvature (one product each, and one more that starts the
    recursion in the range of the curvature, so that a coordinate without gradient and
    without curvature is never moved), the extreme Ritz pairs, and $u \leftarrow V_{new}
    V_{old}^\top u$ for the momentum. A refresh that is not finite, not orthonormal, not
    self-consistent or finds nothing is rejected: the old subspace stays, and `metrics`
    counts it. With a curvature-set rate that `update` could not probe, it is probed
    here.

    Args:
      state: Any nest of Optax states that holds one DHO² state.
      params: The whole parameters, as `value_fn` takes them.
      value_fn: `params -> ()`, the loss on the curvature batch; for curvature="ggn" the
        pair `(outputs_fn, loss_fn)`.
      matvec_fn: Instead of it, `params -> matvec`, your own curvature product.

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

    return replace(state, change)


def maybe_refresh(
    state: CurvatureState, params: Params, products: Products
) -> CurvatureState:
    """Refreshes when the period is full; by the step count alone, on every device."""
    config = state.config
    since = state.count - config.warmup_steps
    due = _is_due(since, config.refresh_period, config.early_refreshes) & state.enabled
    part = tuple(jnp.asarray(x) for x in jax.tree.leaves(params))
    # The identity is `false_fun`: XLA elides the copies of branch 0 only, so that an
    # untaken refresh costs nothing (https://github.com/jax-ml/jax/issues/5986).
    return jax.lax.cond(due, lambda s: refreshed(s, part, products), lambda s: s, state)


def _is_due(since: Any, refresh_period: int, early_refreshes: tuple[int, ...]) -> Any:
    """The schedule, for a Python int and for a traced count alike."""
    due = since % refresh_period == 0
    for early in early_refreshes:
        due |= since == early
    return due & (since >= 0)


def refreshed(
    state: CurvatureState, part: tuple[Array, ...], products: Products
) -> CurvatureState:
    """Returns the state after one refresh at the parameters `part`."""
    config, old, counters = state.config, state.subspace, state.counters
    layout = layout_of_state(state)
    attempt = counters.refreshes + counters.rejected
    new, defect, scale = compute_subspace(config, layout, products.matvec(), attempt)
    # Products in bfloat16 are symmetric only to their own rounding.
    rounding = max(float(jnp.finfo(x.dtype).eps) for x in part)
    rate = state.rate
    direction = None if rate is None else rate.direction
    usable, change, direction = slices.on_slices(
        layout, _compare, new, old, scale, direction, is_active(state)
    )
    accept = usable & (defect <= max(_DEFECT, 4 * rounding))
    moved = linalg.matmul(change, state.momentum)

    def choose(a, b):
        return jax.tree.map(lambda x, y: jnp.where(accept, x, y), a, b)

    if rate is not None:
        rate = choose(rate._replace(direction=direction), rate)
        rate = _probe_if_unprobed(state._replace(rate=rate), choose(new, old), products)
    return state._replace(
        subspace=choose(new, old),
        momentum=choose(moved, state.momentum),
        counters=counters._replace(
            refreshes=counters.refreshes + accept.astype(jnp.int32),
            rejected=counters.rejected + (~accept).astype(jnp.int32),
            refreshed_at=jnp.where(accept, state.count, counters.refreshed_at),
            recurrence_defect=defect,
        ),
        rate=rate,
    )


def compute_subspace(
    config: Config, layout: layouts.Layout, matvec: MatVec, attempt: Array
) -> tuple[subspaces.Subspace, Array, Array]:
    """Returns a new subspace, its recurrence defect and the operator's scale."""
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), attempt)
    bits = jax.random.bits(key, (len(layout.stored),), jnp.uint32)
    on_slices = functools.partial(slices.on_slices, layout)

    def product(v: layouts.Flat) -> layouts.Flat:
        v = matvec(on_slices(lambda _, v: slices.unflatten(v), v))
        return on_slices(lambda _, v: slices.flatten(v), v)

    start = slices.cut(layouts.noise(layout, bits))
    run = lanczos.run(
        product,
        on_slices(lambda _, v: slices.flatten(v), start),
        min(config.num_matvecs, layout.size),
        on_slices,
        in_range=True,
    )
    alphas, betas = lanczos.tridiagonal(run)
    pairs = spectrum.ritz_pairs(alphas, betas, config.num_largest, config.num_smallest)
    new = subspaces.Subspace(
        eigenvalues=pairs.eigenvalues,
        eigenvectors=on_slices(
            lambda _, w, rows: slices.unflatten(linalg.rotate(w, rows)),
            pairs.weights,
            run.basis,
        ),
        valid=pairs.valid,
        next_eigenvalue=pairs.next_eigenvalue,
        residuals=pairs.residuals,
    )
    scale = jnp.max(jnp.abs(alphas)) + 2 * jnp.max(betas)
    return new, lanczos.recurrence_defect(run), scale


def _compare(
    inner: Inner,
    new: subspaces.Subspace,
    old: subspaces.Subspace,
    scale: Array,
    direction: layouts.Packed | None,
    active: Array,
) -> tuple[Array, Array, layouts.Packed | None]:
    """Returns whether `new` may be used, V_new V_old^T, and the last direction.

    The direction is taken off the subspace that its step was orthogonal to. What reads
    the old rows decides over acceptance, so that it comes before the choice: XLA can
    then make the choice in place, and an untaken refresh copies nothing.
    """
    usable = subspaces.is_acceptable(new, scale, inner)
    change = subspaces.change_of_basis(old, new, inner)
    usable &= jnp.all(jnp.isfinite(change))
    if direction is not None:
        direction = subspaces.project_out(direction, old.eigenvectors, active, inner)
        usable &= jnp.isfinite(linalg.norm(direction, inner))
    return usable, change, direction


def _probe_if_unprobed(
    state: CurvatureState, subspace: subspaces.Subspace, products: Products
) -> _rate.RateState:
    """Probes the rate here when `update` had no loss to do it with."""
    rate = state.rate
    assert rate is not None
    unprobed = rate.slope_count >= 2 * _rate.PROBE_PERIOD
    active = is_active(state._replace(subspace=subspace))

    def probe(rate: _rate.RateState) -> _rate.RateState:
        along = slices.on_slices(
            layout_of_state(state),
            lambda inner, d, rows, on: subspaces.project_out(d, rows, on, inner),
            rate.direction,
            subspace.eigenvectors,
            active,
        )
        unlimited = jnp.full((), jnp.inf, jnp.float32)  # the next step caps
        return _rate.adjust(rate, *products.bend(along), unlimited)

    return jax.lax.cond(unprobed, probe, lambda r: r, rate)
