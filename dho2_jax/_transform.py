# SPDX-License-Identifier: Apache-2.0
r"""The hybrid step: where all the parts meet.

Symbols of FOSI (arXiv 2302.08484) and DHO² (arXiv 2505.00982) and their names here:

    g        updates                     V, lambda  Subspace.eigenvectors, .eigenvalues
    k, l     num_largest, num_smallest   lambda_+   Subspace.next_eigenvalue
    m        num_matvecs                 T          refresh_period
    alpha    newton_learning_rate        beta       subspace_decay
    delta    damping                     c          max_base_scaling
    u        CurvatureState.momentum     s          base_scaling in `metrics`

Each step, with c0 = V g:

    1. complement  g2 = g - V^T c0;  d = base.update(g2);  d <- d - V^T V d
    2. momentum    u <- beta u + (1 - beta) c0
    3. update      s d - alpha V^T (u / (|lambda| + delta))

u lives in the span of V and is kept as its k + l coefficients. Four passes over V.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dho2_jax import _layout as layouts
from dho2_jax import _linalg as linalg
from dho2_jax import _rate
from dho2_jax import _refresh as refreshing
from dho2_jax import _subspace as subspaces
from dho2_jax._config import check_number, make_config
from dho2_jax._curvature import check_params
from dho2_jax._state import CurvatureState, DHO2State, init_curvature, is_active
from dho2_jax._types import Array, ScalarOrSchedule

_FLOOR = 0.01  # least |lambda| over the largest, under a curvature-set rate
_FOSI_CLIP = 3.0


def dho2(
    base_optimizer: optax.GradientTransformation,
    *,
    num_largest: int = 16,
    num_smallest: int = 0,
    num_matvecs: int | None = None,
    refresh: str = "periodic",
    refresh_period: int = 200,
    warmup_steps: int = 0,
    newton_learning_rate: ScalarOrSchedule = 1.0,
    subspace_decay: ScalarOrSchedule = 0.9,
    subspace_momentum: str = "ema",
    damping: ScalarOrSchedule = 0.0,
    max_base_scaling: ScalarOrSchedule | None = None,
    base_rate: str = "curvature",
    rate_schedule: ScalarOrSchedule = 1.0,
    curvature: str = "hessian",
    negative_curvature: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""A Newton step in the sharpest subspace, any first-order optimizer elsewhere.

    The k + l extreme eigenvectors V of the Hessian are found by Lanczos every T steps.
    Each step moves by $s\,d - \alpha V^\top (u / (|\lambda| + \delta))$: the base
    optimizer's update d of the gradient's complement, kept orthogonal to V and scaled
    by s, and the damped Newton step on the subspace momentum u. Before the first
    refresh, and whenever no pair is valid, the update is the base optimizer's.

    The loop must hand the loss to `update` (refresh="periodic"), as
    `tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))`, or call
    `dho2_jax.refresh` itself now and then (refresh="external").

    Args:
      base_optimizer: Any Optax transformation, its learning rate included.
      num_largest: k, eigenpairs from the upper end. Static.
      num_smallest: l, eigenpairs from the lower end; k + l >= 1. Static.
      num_matvecs: m >= k + l, Lanczos steps of a refresh; None: k + l + 4. Static.
      refresh: "periodic": inside `update`, every `refresh_period` steps. "external":
        only by `dho2_jax.refresh`. Static.
      refresh_period: T, in updates. Static.
      warmup_steps: Updates before the first periodic refresh. Static.
      newton_learning_rate: alpha; 0 removes the subspace without a Newton step.
      subspace_decay: beta, in [0, 1).
      subspace_momentum: "ema": u <- beta u + (1 - beta) c0. "heavy_ball": u <- beta u +
        c0. "nesterov": u <- beta^2 u + (1 + beta) c0, as FOSI has it. Static.
      damping: delta >= 0, in units of curvature.
      max_base_scaling: c, the cap on s; None: 3 with base_rate="fixed", none otherwise.
      base_rate: How s is set. "fixed": FOSI's s = clip(lambda_max / lambda_min kept of
        the largest, 1, c). "curvature": by the directional curvature along the base's
        own step, guarded; it starts at s <= 1 with the first valid subspace, and then
        |lambda| has a floor of 0.01 lambda_max and the Newton part is at most as long
        as the base part. It wins over the rate and any schedule inside the base (it
        measures the step and compensates): put schedules into `rate_schedule`. Static.
      rate_schedule: Multiplies the whole update; a cosine here is not fought by the
        curvature-set rate.
      curvature: "hessian", "ggn" (then `value_fn` is a pair, see `ggn_vp`),
        "reverse_over_reverse" or "central_difference". Static.
      negative_curvature: What to do along lambda < 0. "abs": a Newton step with
        |lambda|, as FOSI. "base": leave the direction to the base optimizer, since the
        length of a Newton step means nothing there. None: "abs" with
        base_rate="fixed", else "base". Static.
      seed: Of the start vectors of Lanczos. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` takes `value_fn` (`params ->
      ()`), or `matvec_fn` (`params -> matvec`), as a keyword: required for a periodic
      refresh, used with an external one to probe the curvature-set rate. It need not be
      the training loss: a quarter of the batch serves.

    Raises:
      ValueError: In one sentence, for an argument out of its range (here), parameters
        that are not real or fewer than k + l (in `init`), missing `params` or
        `value_fn` (in `update`).

    Numerics: the subspace is float32 whatever the parameters are.
    Deviates from FOSI: the base sees pytrees; the momentum is k + l numbers; Lanczos
    runs in float32 and starts in the range of the curvature; the rate.
    """
    if not (hasattr(base_optimizer, "init") and hasattr(base_optimizer, "update")):
        raise ValueError(
            "`base_optimizer` must be an optax.GradientTransformation, got "
            f"{type(base_optimizer).__name__}; pass for example optax.adam(1e-3)."
        )
    config = make_config(
        num_largest=num_largest,
        num_smallest=num_smallest,
        num_matvecs=num_matvecs,
        refresh=refresh,
        refresh_period=refresh_period,
        warmup_steps=warmup_steps,
        subspace_momentum=subspace_momentum,
        base_rate=base_rate,
        curvature=curvature,
        negative_curvature=negative_curvature,
        seed=seed,
    )
    check_number("newton_learning_rate", newton_learning_rate, 0.0)
    check_number("subspace_decay", subspace_decay, 0.0, 1.0)
    check_number("damping", damping, 0.0)
    if max_base_scaling is None:
        max_base_scaling = _FOSI_CLIP if base_rate == "fixed" else float("inf")
    check_number("max_base_scaling", max_base_scaling, 0.0)
    check_number("rate_schedule", rate_schedule, 0.0)
    base = optax.with_extra_args_support(base_optimizer)

    def init_fn(params):
        if jax.tree.leaves(params):
            check_params(params, "init")
            size = layouts.layout_of(params).size
            if config.size > size:
                raise ValueError(
                    "`num_largest` + `num_smallest` must be at most the number of "
                    f"parameters, got {config.size} for {size}; lower them."
                )
        return DHO2State(base.init(params), init_curvature(config, params))

    def update_fn(
        updates, state, params=None, *, value_fn=None, matvec_fn=None, **extra_args
    ):
        if value_fn is not None:
            extra_args["value_fn"] = value_fn
        ours = state.curvature
        if not jax.tree.leaves(updates):
            updates, base_state = base.update(
                updates, state.base_state, params, **extra_args
            )
            count = optax.safe_increment(ours.count)
            return updates, DHO2State(base_state, ours._replace(count=count))

        layout = refreshing.layout_of_state(ours)
        grads, treedef = jax.tree.flatten(updates)
        layouts.check_shapes(grads, layout, "updates")
        products = _products(config, layout, params, value_fn, matvec_fn)
        if config.refresh == "periodic":
            ours = _periodic(ours, params, products)
        count = ours.count
        rates = {
            "alpha": _at(newton_learning_rate, count),
            "beta": _at(subspace_decay, count),
            "delta": _at(damping, count),
            "cap": _at(max_base_scaling, count),
            "schedule": _at(rate_schedule, count),
        }

        rows, active = ours.subspace.eigenvectors.leaves, is_active(ours)
        grads = tuple(grads)
        c0 = subspaces.coefficients(rows, grads, active)
        complement = subspaces.remove(grads, c0, rows)
        base_updates, base_state = base.update(
            jax.tree.unflatten(treedef, complement),
            state.base_state,
            params,
            **extra_args,
        )
        steps, out_treedef = jax.tree.flatten(base_updates)
        steps = tuple(steps)
        overlap = subspaces.coefficients(rows, steps, active)

        use = jnp.any(active)
        rate = ours.rate
        if rate is None:
            spread = subspaces.spread_of_largest(
                ours.subspace.eigenvalues, active, config.num_smallest
            )
            scale = jnp.where(use, jnp.clip(spread, 1.0, rates["cap"]), 1.0)
        else:
            scale, rate = _ruled(
                rate, complement, steps, overlap, rows, use, products, rates
            )

        momentum = _moved(config.subspace_momentum, ours.momentum, c0, rates["beta"])
        momentum = jnp.where(active, momentum, 0.0)
        newton = rates["alpha"] * momentum * subspaces.newton_scale(
            ours.subspace.eigenvalues,
            active,
            rates["delta"],
            0.0 if rate is None else _FLOOR,
        )
        if rate is not None:
            newton *= _shortening(newton, steps, overlap, scale)

        inside = linalg.combine(scale * overlap + newton, rows)
        new_updates = tuple(
            (rates["schedule"] * (scale * d.astype(jnp.float32) - v)).astype(d.dtype)
            for d, v in zip(steps, inside, strict=True)
        )
        ours = ours._replace(
            count=optax.safe_increment(count),
            momentum=momentum,
            base_scaling=scale,
            rate=rate,
        )
        return (
            jax.tree.unflatten(out_treedef, new_updates),
            DHO2State(base_state, ours),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _products(config, layout, params, value_fn, matvec_fn):
    """The curvature at `params`, None when `update` got no function for it."""
    if config.refresh == "periodic":
        refreshing.check_one_source(
            value_fn, matvec_fn, "update with refresh='periodic'"
        )
    if value_fn is None and matvec_fn is None:
        return None
    refreshing.check_one_source(value_fn, matvec_fn, "update")
    if params is None:
        raise ValueError(
            "`params` must be given to update together with `value_fn`, got None; call "
            "tx.update(grads, state, params, value_fn=...)."
        )
    _, products = refreshing.products_at(config, layout, params, value_fn, matvec_fn)
    return products


def _periodic(ours: CurvatureState, params, products) -> CurvatureState:
    config = ours.config
    since = ours.count - config.warmup_steps
    due = (since >= 0) & (since % config.refresh_period == 0) & ours.enabled
    part = tuple(jax.tree.leaves(params))
    # The identity is `false_fun`: XLA elides the copies of branch 0 only, so that an
    # untaken refresh costs nothing (https://github.com/jax-ml/jax/issues/5986).
    return jax.lax.cond(
        due, lambda s: refreshing.refreshed(s, part, products), lambda s: s, ours
    )


def _ruled(rate, complement, steps, overlap, rows, use, products, rates):
    """One step of the curvature-set rate: `(scale, new RateState)`."""
    layout = rate.direction.layout
    slope = linalg.vdot(complement, rate.direction.leaves)
    started = rate.steps > 0
    seen = _rate.observe(rate, slope)
    rate = _pick(use & started, seen, rate)

    if products is not None:
        slope_ahead = linalg.vdot(complement, steps)

        def probe(rate):
            # The previous direction has not seen this batch; the first has no other.
            fresh = tuple(
                jnp.where(started, a, b)
                for a, b in zip(rate.direction.leaves, steps, strict=True)
            )
            active = jnp.ones(overlap.shape, bool)
            along = subspaces.project_out(fresh, rows, active)
            bend = jnp.abs(products.along(along))
            adjusted = _rate.adjust(rate, bend, rates["schedule"], rates["cap"])
            return _pick(started, adjusted, _rate.first_scale(rate, slope_ahead, bend))

        due = use & (_rate.is_due(rate) | ~started)
        rate = jax.lax.cond(due, probe, lambda r: r, rate)

    rate = rate._replace(
        scale=jnp.minimum(rate.scale, rates["cap"]),
        steps=rate.steps + use.astype(jnp.int32),
        direction=layouts.Packed(steps, layout),
    )
    return jnp.where(use, rate.scale, 1.0), rate


def _shortening(newton: Array, steps, overlap: Array, scale: Array) -> Array:
    """Factor that keeps the Newton part no longer than the base part."""
    outside = linalg.vdot(steps, steps) - jnp.sum(overlap**2)
    length = scale * jnp.sqrt(jnp.maximum(outside, 0.0))
    own = jnp.sqrt(jnp.sum(newton**2))
    return jnp.minimum(1.0, length / jnp.where(own > 0, own, 1.0))


def _moved(kind: str, momentum: Array, c0: Array, beta: Array) -> Array:
    if kind == "heavy_ball":
        return beta * momentum + c0
    if kind == "nesterov":
        return beta**2 * momentum + (1 + beta) * c0
    return beta * momentum + (1 - beta) * c0


def _pick(condition: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _at(rate: ScalarOrSchedule, count: Array) -> Array:
    return jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
